import { clip_scale, global_norm } from "../../src/ops/global_norm.ts";
import * as ref from "../../src/reference/global_norm.ts";
import { type Draw, opSamples } from "./suite.ts";

export default [
  opSamples({
    op: global_norm, reference: ref.global_norm,
    samples: [
      { name: "one tensor of one element", args: (r) => [[r.normal([1])]] },
      {
        name: "sizes of all kinds",
        args: (r) => [[r.normal([37, 13]), r.normal([8]), r.normal([0, 3]), r.normal([5])]],
      },
      { name: "nothing but empty tensors", args: (r) => [[r.normal([0]), r.normal([3, 0])]] },
      { name: "all zero", args: (r) => [[r.normal([30], 0)]] },
      { name: "several slabs", args: (r) => [[r.normal([130, 132]), r.normal([4099])]], reduction: 4096 },
      { name: "small and large gradients", args: (r) => [[r.normal([100], 1e-8), r.normal([100], 1e8)]] },
    ],
    errors: [{ name: "an empty list", args: () => [[]], message: /global_norm.*at least one tensor.*none/ }],
  }),
  opSamples({
    op: clip_scale, reference: ref.clip_scale,
    samples: [
      { name: "a norm above", args: (r) => [r.of([1], [4]), 1] },
      { name: "a norm below", args: (r) => [r.of([1], [0.25]), 1] },
      { name: "a norm of zero", args: (r) => [r.of([1], [0]), 0.5] },
      { name: "no clipping", args: (r) => [r.of([1], [3e18]), Infinity] },
      { name: "a finite loss", args: (r) => [r.of([1], [4]), 1, r.of([], [-3e38])] },
      ...[NaN, Infinity, -Infinity].flatMap((value) => [
        { name: `a norm that is ${value}`, args: (r: Draw) => [r.of([1], [value]), 1, r.of([], [2])] },
        { name: `a loss that is ${value}`, args: (r: Draw) => [r.of([1], [4]), 1, r.of([], [value])] },
      ]),
    ],
    errors: [
      {
        name: "several norms", args: (r) => [r.normal([2]), 1],
        message: /clip_scale.*norm.*\[1\].*\[2\]/,
      },
      {
        name: "several losses", args: (r) => [r.normal([1]), 1, r.normal([3])],
        message: /clip_scale.*loss.*\[1\].*\[3\]/,
      },
    ],
  }),
];
