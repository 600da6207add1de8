"""What a worker does with a load: a model of five kinds of numbers, fitted to measured points.

A worker that runs `c` requests at a time, of `P` prompt and `G` generated tokens each, needs

    T(c) = G · (step(c) + context · c · (P + G / 2)) + c · P · prompt

seconds until each of them has ended: G steps of c rows, whose attention reads the tokens before, and
c prompts, which all requests wait for. It ends c / T(c) requests a second. `step` is a table over
rows, in between linear; `context` and `prompt` are seconds a token. Requests that come at random wait
for prompts before theirs as in an M/D/1 queue, whose tail is exponential for long waits.

The page beside this file (page.html) computes the same in JavaScript.
"""

import math


class Worker:
    """`step`: [(rows, seconds)], ascending."""

    def __init__(self, step, context, prompt):
        self.step, self.context, self.prompt = step, context, prompt

    def step_seconds(self, rows):
        """Of a step of so many rows, without the attention to what lies before."""
        (low, low_s), *rest = self.step
        for high, high_s in rest:
            if rows <= high:
                return low_s + (high_s - low_s) * max(0.0, rows - low) / (high - low)
            low, low_s = high, high_s
        return low_s * rows / low

    def cycle_seconds(self, rows, p, g):
        step = self.step_seconds(rows) + self.context * rows * (p + g / 2)
        return g * step + rows * p * self.prompt

    def rate(self, rows, p, g):
        """Requests a second."""
        return rows / self.cycle_seconds(rows, p, g)

    def rows_for(self, rate, p, g):
        """The fewest rows at which a worker ends `rate` requests a second, or None."""
        most = self.step[-1][0]
        if self.rate(most, p, g) < rate:
            return None
        low, high = 0.0, float(most)
        for _ in range(50):
            middle = (low + high) / 2
            if middle > 0 and self.rate(middle, p, g) >= rate:
                high = middle
            else:
                low = middle
        return high

    def per_token(self, rows, p, g):
        """Mean seconds between two tokens of a request."""
        return self.cycle_seconds(rows, p, g) / g

    def first_token(self, rate, rows, p):
        """Seconds to the first token that 95 of 100 requests keep."""
        own = p * self.prompt
        busy = min(rate * own, 0.999)
        waits = own * math.log(20 * busy) / (2 * (1 - busy)) if busy > 0.05 else 0.0
        return own + self.step_seconds(max(rows, 1)) + waits


def plan(worker, rate, p, g, per_token_max, first_token_max, headroom=0.8, workers_max=10_000):
    """The fewest workers for `rate` requests a second within both goals (seconds), or None."""
    for workers in range(1, workers_max + 1):
        each = rate / workers
        rows = worker.rows_for(each / headroom, p, g)
        if (
            rows is not None
            and worker.per_token(rows, p, g) <= per_token_max
            and worker.first_token(each, rows, p) <= first_token_max
        ):
            return workers
    return None


def fit(points):
    """A worker from measured [(rows, P, G, requests a second)], by least squares of the relative
    errors of T; the cost of context is 0 where the points would have it below."""
    rows = sorted({point[0] for point in points})
    for terms in (2, 1):
        matrix, wanted = [], []
        for c, p, g, rate in points:
            seconds = c / rate
            line = [0.0] * len(rows)
            line[rows.index(c)] = g
            line += [c * p, g * c * (p + g / 2)][:terms]
            matrix.append([value / seconds for value in line])
            wanted.append(1.0)
        found = least_squares(matrix, wanted)
        step, (prompt, context) = found[: len(rows)], (found[len(rows) :] + [0.0])[:2]
        if context >= 0:
            break
    if min(step) <= 0 or prompt <= 0:
        raise SystemExit(f"the points do not tell steps from prompts: {step}, {prompt}")
    return Worker(list(zip(rows, step)), context, prompt)


def least_squares(matrix, wanted):
    """x that minimizes |matrix · x − wanted|, by the normal equations."""
    num = len(matrix[0])
    normal = [
        [sum(line[i] * line[j] for line in matrix) for j in range(num)]
        + [sum(line[i] * value for line, value in zip(matrix, wanted))]
        for i in range(num)
    ]
    for i in range(num):
        pivot = max(range(i, num), key=lambda k: abs(normal[k][i]))
        normal[i], normal[pivot] = normal[pivot], normal[i]
        if abs(normal[i][i]) < 1e-30:
            raise SystemExit("the points do not tell the worker's numbers apart: measure more")
        for k in range(num):
            if k != i:
                factor = normal[k][i] / normal[i][i]
                normal[k] = [a - factor * b for a, b in zip(normal[k], normal[i])]
    return [normal[i][num] / normal[i][i] for i in range(num)]
