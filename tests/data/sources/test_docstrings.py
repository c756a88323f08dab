import ast

from qies.data.sources.docstrings import docstrings, prose

NUMPYDOC = """
solve(a, b)

Solve the *linear* equation ``a x = b`` for a
square matrix `a` [1]_.

.. versionadded:: 1.2
   Long ago.

It uses :func:`~scipy.linalg.lu` as follows::

    lu(a)

- first item
  goes on
- second item

Parameters
----------
a : (M, M) array_like
    A square matrix.

    It may be singular.
b : array_like, optional

Returns
-------
x : ndarray
    The solution.

See Also
--------
lu : something else

Notes
-----
The cost is

.. math:: n^3

for :math:`n` unknowns.

=====  =====
kind   cost
=====  =====
dense  n^3
=====  =====

References
----------
.. [1] A book.

Examples
--------
>>> solve(1, 2)
2
"""

PROSE = """\
Solve the linear equation a x = b for a square matrix a.

It uses scipy.linalg.lu as follows:

- first item goes on
- second item

Parameters
a ((M, M) array_like): A square matrix. It may be singular.
b (array_like, optional)

Returns
x (ndarray): The solution.

Notes
The cost is

for n unknowns."""


def test_numpydoc_becomes_prose() -> None:
    assert prose(NUMPYDOC.strip("\n")) == PROSE


def test_docstrings_are_found_without_running_anything() -> None:
    source = '''
"""Module."""
import nothing_of_this_name
raise SystemExit
class A:
    """Class."""
    def f(self):
        """Method."""
        def inner():
            """Not public."""
add_newdoc("x", """
    Added.
    """)
'''
    assert [text for text in docstrings(ast.parse(source)) if text] == ["Module.", "Class.", "Method.", "x", "Added."]
