import type { RouterScore } from "../../src/ops/router.ts";
import { router_aux_counts, router_aux_loss, router_z_loss } from "../../src/ops/router_loss.ts";
import * as ref from "../../src/reference/router_loss.ts";
import { type Draw, type HostTensor, opSamples } from "./suite.ts";

/** Logits of S sequences of L tokens with the counts that they would give. */
function drawn(
  r: Draw, [S, L, E]: readonly [number, number, number], topk: number,
): [HostTensor, HostTensor] {
  const logits = r.normal([S * L, E]);
  const { shape, data } = ref.router_aux_counts(logits, { topk, sequences: S });
  return [logits, r.of(shape, [...data], "u32")];
}

const SCORES: RouterScore[] = ["softmax", "softmax_chosen", "sqrtsoftplus"];
const worked = [1, -0.5, 0.25, 0.75, 0.3, 0.9, -0.2, 0.1, -1, 0.5, 2, 0.4];

export default [
  opSamples({
    op: router_aux_counts, reference: ref.router_aux_counts,
    samples: [
      { name: "no sequences", args: (r) => [r.normal([0, 4]), { topk: 2, sequences: 0 }] },
      { name: "empty sequences", args: (r) => [r.normal([0, 4]), { topk: 2, sequences: 2 }] },
      { name: "one token", args: (r) => [r.normal([1, 8]), { topk: 2, sequences: 1 }] },
      { name: "several sequences, odd sizes", args: (r) => [r.normal([201, 13]), { topk: 3, sequences: 3 }] },
      {
        name: "equal logits go to the lowest experts",
        args: (r) => [r.of([2, 5], Array(10).fill(0.5)), { topk: 3, sequences: 1 }],
      },
      {
        name: "added to earlier counts",
        args: (r) => [r.normal([30, 6]), { topk: 2, sequences: 2 }, r.integers([2, 6], 0, 99, "u32")],
      },
    ],
    errors: [
      {
        name: "logits of rank 3", args: (r) => [r.normal([1, 2, 4]), { topk: 1, sequences: 1 }],
        message: /router_aux_counts.*logits.*\[S \* L, E\].*\[1, 2, 4\]/,
      },
      {
        name: "too many choices", args: (r) => [r.normal([2, 4]), { topk: 5, sequences: 1 }],
        message: /router_aux_counts.*topk.*from 1 to 4.*5/,
      },
      {
        name: "sequences that do not divide the tokens",
        args: (r) => [r.normal([7, 4]), { topk: 1, sequences: 2 }],
        message: /router_aux_counts.*sequences.*divisor of 7.*2/,
      },
      {
        name: "earlier counts of another shape",
        args: (r) => [r.normal([4, 4]), { topk: 1, sequences: 2 }, r.integers([1, 4], 0, 9, "u32")],
        message: /router_aux_counts.*earlier.*\[2, 4\].*\[1, 4\]/,
      },
    ],
  }),
  opSamples({
    op: router_aux_loss, reference: ref.router_aux_loss, vjp: ref.router_aux_loss_vjp,
    samples: [
      { name: "no sequences", args: (r) => [...drawn(r, [0, 5, 4], 2), { coeff: 1e-2 }] },
      { name: "empty sequences", args: (r) => [...drawn(r, [2, 0, 4], 2), { coeff: 1e-2 }] },
      { name: "one token", args: (r) => [...drawn(r, [1, 1, 8], 2), { coeff: 1e-2 }] },
      {
        name: "worked numbers",
        args: (r) => [r.of([3, 4], worked), r.of([1, 4], [2, 2, 1, 1], "u32"), { coeff: 0.01 }],
      },
      {
        name: "several sequences", args: (r) => [...drawn(r, [3, 67, 13], 3), { coeff: 1e-4 }],
        reduction: 201,
      },
      {
        name: "128 experts", args: (r) => [...drawn(r, [2, 33, 128], 6), { coeff: 1e-4 }], reduction: 128,
      },
      ...SCORES.map((score) => ({
        name: score, args: (r: Draw) => [...drawn(r, [2, 9, 7], 2), { coeff: 1e-2, score }],
      })),
      {
        name: "far from zero, softmax", args: (r) => [
          r.of([2, 3], [900, 899, 898, -900, -899.5, -901]), r.of([1, 3], [1, 2, 1], "u32"),
          { coeff: 1, score: "softmax" },
        ],
      },
      {
        name: "far below zero, sqrtsoftplus", args: (r) => [
          r.of([2, 3], [-20, -14, -15.5, -60, -62, -61]), r.of([1, 3], [1, 2, 1], "u32"),
          { coeff: 1, score: "sqrtsoftplus" },
        ],
      },
      {
        name: "counts of other tokens too", args: (r) => [
          r.normal([6, 5]), r.integers([2, 5], 3, 40, "u32"), { coeff: 0.1, tokens: 50 },
        ],
      },
    ],
    errors: [
      {
        name: "logits of rank 3",
        args: (r) => [r.normal([1, 2, 4]), r.integers([1, 4], 0, 2, "u32"), { coeff: 1 }],
        message: /router_aux_loss.*logits.*\[S \* L, E\].*\[1, 2, 4\]/,
      },
      {
        name: "counts of other experts",
        args: (r) => [r.normal([4, 4]), r.integers([1, 5], 0, 2, "u32"), { coeff: 1 }],
        message: /router_aux_loss.*counts.*\[S, 4\].*\[1, 5\]/,
      },
      {
        name: "no tokens in all", args: (r) => [...drawn(r, [1, 2, 4], 1), { coeff: 1, tokens: 0 }],
        message: /router_aux_loss.*tokens.*above 0.*0/,
      },
    ],
  }),
  opSamples({
    op: router_z_loss, reference: ref.router_z_loss, vjp: ref.router_z_loss_vjp,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 4]), { coeff: 1e-3 }] },
      { name: "one token", args: (r) => [r.normal([1, 8]), { coeff: 1e-3 }] },
      { name: "odd sizes", args: (r) => [r.normal([133, 13], 3), { coeff: 1e-3 }], reduction: 133 },
      { name: "far from zero", args: (r) => [r.of([2, 3], [200, 199, 198, -200, -199, -201]), { coeff: 1 }] },
      { name: "a share of more tokens", args: (r) => [r.normal([7, 5]), { coeff: 1, tokens: 28 }] },
    ],
    errors: [
      {
        name: "logits of rank 3", args: (r) => [r.normal([1, 2, 4]), { coeff: 1 }],
        message: /router_z_loss.*logits.*\[T, E\].*\[1, 2, 4\]/,
      },
      {
        name: "no experts", args: (r) => [r.normal([2, 0]), { coeff: 1 }],
        message: /router_z_loss.*logits.*with an expert.*\[2, 0\]/,
      },
      {
        name: "no tokens in all", args: (r) => [r.normal([2, 4]), { coeff: 1, tokens: -1 }],
        message: /router_z_loss.*tokens.*above 0.*-1/,
      },
    ],
  }),
];
