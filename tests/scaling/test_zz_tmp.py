from test_calibration import DESIGNS, simulate


def test_tmp(quick_fits):
    cells, seeds, gain, dev, _ = DESIGNS["5 sizes x {20 N, 60 N}, 3 seeds, sizes 0.3 %"]
    for s in range(1, 9):
        print(s, simulate(cells, seeds, gain, dev, 100, seed=s), flush=True)
