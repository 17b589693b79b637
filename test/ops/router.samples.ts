import { router, router_weights } from "../../src/ops/router.ts";
import type { RouterOptions, WeightOptions } from "../../src/ops/router.ts";
import * as ref from "../../src/reference/router.ts";
import { type Draw, opSamples } from "./suite.ts";

const flat = (topk: number, more: Partial<RouterOptions> = {}): RouterOptions => ({
  topk, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 2.5, ...more,
});
const drawn = (T: number, E: number, options: RouterOptions) => (r: Draw) => [
  r.normal([T, E]), r.normal([E], 0.2), options,
];
const weights = (more: Partial<WeightOptions>): WeightOptions => ({
  norm_topk_prob: true, scaling: 2.5, ...more,
});
/** Every token's experts: its number, and those that follow in steps of 1, ascending. */
const given = (T: number, E: number, K: number, more: Partial<WeightOptions>) => (r: Draw) => [
  r.normal([T, E]),
  r.of([T, K], Array.from({ length: T }, (_, t) =>
    Array.from({ length: K }, (_, k) => (t + k) % E).sort((a, b) => a - b)).flat(), "u32"),
  weights(more),
];

export default [
  opSamples({
    op: router, reference: ref.router, vjp: ref.router_vjp,
    samples: [
      { name: "no tokens", args: drawn(0, 8, flat(2)) },
      { name: "one token", args: drawn(1, 128, flat(6)) },
      { name: "a partial workgroup, odd experts", args: drawn(67, 13, flat(3)) },
      { name: "one expert", args: drawn(5, 1, flat(1, { norm_topk_prob: false })) },
      { name: "every expert", args: drawn(3, 7, flat(7)) },
      { name: "512 experts, 22 of them", args: drawn(70, 512, flat(22, { scaling: 5 })) },
      { name: "more than 32 x 32 experts", args: drawn(3, 1040, flat(5)) },
      { name: "weights as they are", args: drawn(9, 16, flat(4, { norm_topk_prob: false })) },
      { name: "groups", args: drawn(65, 16, flat(3, { n_group: 4, topk_group: 2 })) },
      { name: "groups of one expert", args: drawn(9, 6, flat(2, { n_group: 6, topk_group: 3 })) },
      { name: "groups of three, one stays", args: drawn(9, 9, flat(3, { n_group: 3, topk_group: 1 })) },
      { name: "32 groups", args: drawn(66, 256, flat(8, { n_group: 32, topk_group: 4 })) },
      {
        name: "negative and large scores",
        args: (r) => [
          r.of([2, 4], [-30, -25, -20, -15, 10, 12, 14, 16]), r.of([4], [-3, -2, 1, -1]), flat(2),
        ],
      },
      { name: "one of many, as it is", args: drawn(9, 8, flat(1, { norm_topk_prob: false })) },
      ...(["softmax", "softmax_chosen", "sqrtsoftplus"] as const).flatMap((score) => [
        { name: score, args: drawn(19, 24, flat(4, { score })) },
        { name: `${score}, as it is`, args: drawn(5, 24, flat(3, { score, norm_topk_prob: false })) },
        { name: `${score}, groups`, args: drawn(9, 16, flat(3, { score, n_group: 4, topk_group: 2 })) },
      ]),
      {
        name: "softmax over all, one chosen",
        args: drawn(9, 8, flat(1, { score: "softmax", norm_topk_prob: false })),
      },
      {
        name: "groups by their best",
        args: drawn(33, 16, flat(3, { n_group: 4, topk_group: 2, group_best: 1 })),
      },
      {
        name: "groups by their three best",
        args: drawn(33, 16, flat(6, { n_group: 4, topk_group: 2, group_best: 3 })),
      },
      {
        name: "groups by more than they hold",
        args: drawn(9, 9, flat(3, { n_group: 3, topk_group: 2, group_best: 8 })),
      },
      { name: "the bias added to logits", args: drawn(19, 12, flat(3, { choice: "logits" })) },
      {
        name: "far from zero, softmax over all", args: (r) => [
          r.of([2, 4], [300, 299, 298, 100, -400, -401, -402, -399.5]), r.of([4], [0, 0, 0, 0]),
          flat(2, { score: "softmax", norm_topk_prob: false }),
        ],
      },
      {
        name: "far below the largest, softmax over the chosen", args: (r) => [
          r.of([1, 4], [300, 0, -1, -2]), r.of([4], [-900, 0, 0, 0]), flat(2, { score: "softmax_chosen" }),
        ],
      },
      {
        name: "far below zero, sqrtsoftplus", args: (r) => [
          r.of([2, 4], [-16, -14.9, -15.1, -40, -90, -100, -120, -95]), r.of([4], [0, 0, 0, 0]),
          flat(2, { score: "sqrtsoftplus" }),
        ],
      },
      {
        name: "the bias chooses, the score weighs",
        args: (r) => [r.of([1, 3], [2, 1, -2]), r.of([3], [0, 0, 5]), flat(2)],
      },
    ],
    errors: [
      {
        name: "a bias of the wrong width",
        args: (r) => [r.normal([2, 4]), r.normal([3]), flat(1)], message: /router.*bias.*\[4\].*\[3\]/,
      },
      {
        name: "logits of rank 3", args: (r) => [r.normal([1, 2, 4]), r.normal([4]), flat(1)],
        message: /router.*logits.*\[T, E\].*\[1, 2, 4\]/,
      },
      {
        name: "groups that do not divide the experts",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(1, { n_group: 3 })],
        message: /router.*n_group.*divisor of 8.*3/,
      },
      {
        name: "more groups to keep than there are",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(1, { n_group: 2, topk_group: 3 })],
        message: /router.*topk_group.*from 1 to 2.*3/,
      },
      {
        name: "groups of which nobody counts",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(1, { n_group: 2, group_best: 0 })],
        message: /router.*group_best.*whole number above 0.*0/,
      },
      {
        name: "softmax over one expert",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(1, { score: "softmax_chosen" })],
        message: /router.*topk.*above 1 for softmax_chosen.*1/,
      },
      {
        name: "more experts than the kept groups hold",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(3, { n_group: 4, topk_group: 1 })],
        message: /router.*topk.*from 1 to 2.*3/,
      },
    ],
  }),
  opSamples({
    op: router_weights, reference: ref.router_weights, vjp: ref.router_weights_vjp,
    samples: [
      { name: "no tokens", args: given(0, 8, 2, {}) },
      { name: "one token", args: given(1, 128, 6, {}) },
      { name: "odd sizes", args: given(67, 13, 3, {}) },
      { name: "as they are", args: given(9, 16, 4, { norm_topk_prob: false }) },
      { name: "softmax over the chosen", args: given(9, 16, 4, { score: "softmax_chosen" }) },
      { name: "softmax over all", args: given(9, 16, 4, { score: "softmax", norm_topk_prob: false }) },
      { name: "sqrtsoftplus", args: given(9, 16, 4, { score: "sqrtsoftplus" }) },
    ],
    errors: [
      {
        name: "choices of other tokens",
        args: (r) => [r.normal([3, 4]), r.integers([2, 2], 0, 4, "u32"), weights({})],
        message: /router_weights.*topk_idx.*\[3, K\].*\[2, 2\]/,
      },
      {
        name: "logits of rank 3",
        args: (r) => [r.normal([1, 3, 4]), r.integers([3, 2], 0, 4, "u32"), weights({})],
        message: /router_weights.*logits.*\[T, E\].*\[1, 3, 4\]/,
      },
      {
        name: "softmax over one expert",
        args: (r) => [
          r.normal([2, 4]), r.integers([2, 1], 0, 4, "u32"), weights({ score: "softmax_chosen" }),
        ],
        message: /router_weights.*topk.*above 1 for softmax_chosen.*1/,
      },
    ],
  }),
];
