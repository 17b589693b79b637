import { keep_largest, withhold } from "../../src/ops/overflow.ts";
import * as ref from "../../src/reference/overflow.ts";
import { opSamples } from "./suite.ts";

export default [
  opSamples({
    op: keep_largest, reference: ref.keep_largest,
    samples: [[0, 7], [2, 3], [2, 9]].map(([at, missing]) => ({
      name: `${missing} at ${at}`,
      args: (r) => [r.of([3], [5, 0, 8], "u32"), r.of([1], [missing!], "u32"), at],
    })),
    errors: [{
      name: "a place beyond the end", args: (r) => [r.of([2], [0, 0], "u32"), r.of([1], [1], "u32"), 2],
      message: /keep_largest.*at must be from 0 to 1, found 2/,
    }],
  }),
  opSamples({
    op: withhold, reference: ref.withhold,
    samples: [
      { name: "nothing missing", args: (r) => [r.of([1], [0.25]), r.of([5], [0, 0, 0, 0, 0], "u32")] },
      { name: "a row missing", args: (r) => [r.of([1], [0.25]), r.of([5], [0, 0, 0, 1, 0], "u32")] },
      { name: "withheld already", args: (r) => [r.of([1], [-1]), r.of([1], [0], "u32")] },
    ],
    errors: [{
      name: "two gates", args: (r) => [r.of([2], [1, 1]), r.of([1], [0], "u32")],
      message: /withhold.*gate must be \[1\]/,
    }],
  }),
];
