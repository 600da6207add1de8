"""python3 -B benches/capacity/test_model.py"""

import random
import unittest

import model

ROWS = [1, 2, 4, 8, 16, 32, 64]
WORKER = model.Worker([(c, 0.004 + 0.0005 * c) for c in ROWS], 2e-8, 4e-4)


def points(worker, noise=0.0):
    random.seed(1)
    return [
        (c, p, g, worker.rate(c, p, g) * (1 + random.uniform(-noise, noise)))
        for p, g in [(32, 64), (128, 64), (384, 32)]
        for c in ROWS
    ]


class Model(unittest.TestCase):
    def test_finds_the_numbers_behind_points(self):
        found = model.fit(points(WORKER))
        for (_, got), (_, wanted) in zip(found.step, WORKER.step):
            self.assertAlmostEqual(got, wanted, delta=1e-9)
        self.assertAlmostEqual(found.prompt, WORKER.prompt, delta=1e-10)
        self.assertAlmostEqual(found.context, WORKER.context, delta=1e-12)

    def test_noise_moves_other_loads_little(self):
        found = model.fit(points(WORKER, 0.05))
        for load in [(6, 200, 48), (24, 160, 64)]:
            self.assertLess(abs(found.rate(*load) / WORKER.rate(*load) - 1), 0.05)

    def test_a_load_takes_no_more_workers_than_it_needs(self):
        goals = dict(per_token_max=0.2, first_token_max=5.0, headroom=0.8)
        workers = model.plan(WORKER, 40.0, 128, 64, **goals)
        most = WORKER.rate(64, 128, 64)
        self.assertGreaterEqual(workers * most * 0.8, 40.0)
        self.assertLess((workers - 1) * most * 0.8, 40.0)
        self.assertEqual(model.plan(WORKER, 80.0, 128, 64, **goals), -(-80.0 // (most * 0.8)))

    def test_stricter_goals_take_more_workers(self):
        few = model.plan(WORKER, 40.0, 128, 64, 0.2, 5.0)
        for goals in [(0.02, 5.0), (0.2, 0.08)]:
            self.assertGreater(model.plan(WORKER, 40.0, 128, 64, *goals), few)
        self.assertIsNone(model.plan(WORKER, 40.0, 128, 64, 0.001, 5.0))

    def test_points_that_tell_nothing_are_refused(self):
        with self.assertRaises(SystemExit):
            model.fit([(1, 32, 64, 3.0), (2, 32, 64, 5.0)])


unittest.main()
