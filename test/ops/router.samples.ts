import { router } from "../../src/ops/router.ts";
import type { RouterOptions } from "../../src/ops/router.ts";
import * as ref from "../../src/reference/router.ts";
import { type Draw, opSamples } from "./suite.ts";

const flat = (topk: number, more: Partial<RouterOptions> = {}): RouterOptions => ({
  topk, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 2.5, ...more,
});
const drawn = (T: number, E: number, options: RouterOptions) => (r: Draw) => [
  r.normal([T, E]), r.normal([E], 0.2), options,
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
        name: "more experts than the kept groups hold",
        args: (r) => [r.normal([2, 8]), r.normal([8]), flat(3, { n_group: 4, topk_group: 1 })],
        message: /router.*topk.*from 1 to 2.*3/,
      },
    ],
  }),
];
