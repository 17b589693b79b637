import { router_quantile, update_quantile_bias } from "../../src/ops/quantile_balance.ts";
import * as ref from "../../src/reference/quantile_balance.ts";
import { opSamples } from "./suite.ts";

export default [
  opSamples({
    op: router_quantile, reference: ref.router_quantile,
    samples: [
      { name: "as many tokens as experts", args: (r) => [r.normal([4, 4]), r.normal([4], 0.1), { topk: 1 }] },
      {
        name: "all experts but one", args: (r) => [r.normal([10, 5]), r.normal([5], 0.1), { topk: 4 }],
      },
      {
        name: "more tokens than invocations",
        args: (r) => [r.normal([130, 13], 3), r.normal([13]), { topk: 2 }],
      },
      {
        name: "equal logits",
        args: (r) => [r.of([4, 4], Array(16).fill(-2)), r.normal([4], 0.1), { topk: 2 }],
        tolerance: 1e-4, // small differences of numbers near 2
      },
    ],
    errors: [
      {
        name: "a load that cannot be even", args: (r) => [r.normal([3, 4]), r.normal([4]), { topk: 1 }],
        message: /router_quantile.*tokens \* topk.*multiple of 4.*3/,
      },
      {
        name: "every expert", args: (r) => [r.normal([4, 4]), r.normal([4]), { topk: 4 }],
        message: /router_quantile.*topk.*from 1 to 3.*4/,
      },
      {
        name: "a bias of another width", args: (r) => [r.normal([4, 4]), r.normal([5]), { topk: 1 }],
        message: /router_quantile.*bias.*\[4\].*\[5\]/,
      },
      {
        name: "rank 3", args: (r) => [r.normal([1, 4, 4]), r.normal([4]), { topk: 1 }],
        message: /router_quantile.*logits.*\[T, E\].*\[1, 4, 4\]/,
      },
    ],
  }),
  opSamples({
    op: update_quantile_bias, reference: ref.update_quantile_bias,
    samples: [
      { name: "two experts", args: (r) => [r.normal([2]), r.normal([2]), 0.5] },
      { name: "half of the way", args: (r) => [r.normal([7]), r.normal([7]), 0.5] },
      { name: "more experts than invocations", args: (r) => [r.normal([130]), r.normal([130]), 0.9] },
      { name: "an open gate", args: (r) => [r.normal([3]), r.normal([3]), 0.1, r.of([1], [0])] },
      { name: "a closed gate", args: (r) => [r.normal([3]), r.normal([3]), 0.1, r.of([1], [-1])] },
    ],
    errors: [
      {
        name: "an estimate of another width", args: (r) => [r.normal([3]), r.normal([4]), 0.1],
        message: /update_quantile_bias.*estimate.*\[3\].*\[4\]/,
      },
      {
        name: "more than all of the way", args: (r) => [r.normal([3]), r.normal([3]), 1.5],
        message: /update_quantile_bias.*rate.*from 0 to 1.*1.5/,
      },
      {
        name: "no experts", args: (r) => [r.normal([0]), r.normal([0]), 0.5],
        message: /update_quantile_bias.*bias.*with an expert.*\[0\]/,
      },
      {
        name: "a gate of another size", args: (r) => [r.normal([3]), r.normal([3]), 0.1, r.of([2], [1, 1])],
        message: /update_quantile_bias.*gate.*\[1\].*\[2\]/,
      },
    ],
  }),
];
