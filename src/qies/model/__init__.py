"""QIES models, registered with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qies.model.cache import QiesCache
from qies.model.configuration import QiesConfig
from qies.model.modeling import QiesForCausalLM, QiesModel

__all__ = ["QiesCache", "QiesConfig", "QiesForCausalLM", "QiesModel"]

AutoConfig.register("qies", QiesConfig, exist_ok=True)
AutoModel.register(QiesConfig, QiesModel, exist_ok=True)
AutoModelForCausalLM.register(QiesConfig, QiesForCausalLM, exist_ok=True)
