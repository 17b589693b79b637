import { linear_cross_entropy } from "../../src/ops/linear_cross_entropy.ts";
import * as ref from "../../src/reference/linear_cross_entropy.ts";
import { type Draw, opSamples, type Sample } from "./suite.ts";

/** T rows of width D against a vocabulary of V, every third label left out. */
function rows(name: string, [T, D, V]: [number, number, number], options = {}, deviation = 0.5): Sample {
  return {
    name, reduction: Math.max(T, D, V),
    args: (r: Draw) => {
      const labels = r.integers([T], 0, V);
      labels.data.forEach((_, t) => { if (t % 3 === 2) labels.data[t] = -100; });
      return [r.normal([T, D], deviation), r.normal([V, D]), labels, options];
    },
  };
}

export default opSamples({
  op: linear_cross_entropy, reference: ref.linear_cross_entropy, vjp: ref.linear_cross_entropy_vjp,
  samples: [
    rows("whole vectors", [20, 16, 48]),
    rows("odd sizes", [19, 13, 65]),
    rows("odd vocabulary", [24, 16, 65]),
    rows("whole chunks", [20, 16, 48], { vocab_chunk: 16 }),
    rows("a last chunk of one", [20, 12, 33], { vocab_chunk: 16 }),
    rows("odd chunks", [18, 9, 47], { vocab_chunk: 11 }),
    rows("sharp distributions", [16, 24, 40], { vocab_chunk: 12 }, 8),
    rows("more columns than a workgroup takes at once", [5, 8, 700]),
    rows("many rows", [150, 8, 20]),
    rows("one row", [1, 12, 30]),
    rows("one word", [6, 8, 1]),
    {
      name: "labels outside the vocabulary",
      args: (r) => [
        r.normal([5, 8]), r.normal([10, 8]), r.of([5], [9, 10, -1, 2147483647, 0], "i32"), { vocab_chunk: 4 },
      ],
    },
    {
      name: "no scored row",
      args: (r) => [r.normal([3, 8]), r.normal([10, 8]), r.of([3], [-100, -100, -100], "i32"), {}],
    },
    { name: "no rows", args: (r) => [r.normal([0, 8]), r.normal([10, 8]), r.integers([0], 0, 10), {}] },
  ],
  errors: [
    {
      name: "weight of the wrong width", message: /linear_cross_entropy.*weight.*\[V, 4\].*\[9, 5\]/,
      args: (r) => [r.normal([2, 4]), r.normal([9, 5]), r.integers([2], 0, 9), {}],
    },
    {
      name: "another number of labels", message: /linear_cross_entropy.*labels.*\[2\].*\[3\]/,
      args: (r) => [r.normal([2, 4]), r.normal([9, 4]), r.integers([3], 0, 9), {}],
    },
    {
      name: "a chunk of nothing", message: /linear_cross_entropy.*vocab_chunk.*found 0/,
      args: (r) => [r.normal([2, 4]), r.normal([9, 4]), r.integers([2], 0, 9), { vocab_chunk: 0 }],
    },
  ],
});
