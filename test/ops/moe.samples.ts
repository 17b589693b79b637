import {
  expert_load, moe_permute, moe_plan, moe_unpermute, type PlanPart, update_expert_bias,
} from "../../src/ops/moe.ts";
import { keep_choices, type LimitOptions, moe_limit } from "../../src/ops/moe_limit.ts";
import { moe_weigh } from "../../src/ops/moe_weigh.ts";
import * as ref from "../../src/reference/moe.ts";
import { type Draw, type HostTensor, opSamples } from "./suite.ts";

/** K different experts for each of T tokens, ascending as the router writes them. */
function choices(r: Draw, T: number, K: number, E: number): HostTensor {
  const chosen: number[] = [];
  for (let t = 0; t < T; t++) {
    const experts = Array.from({ length: E }, (_, e) => e);
    for (let k = 0; k < K; k++) {
      const at = k + Math.floor(r.next() * (E - k));
      [experts[k], experts[at]] = [experts[at]!, experts[k]!];
    }
    chosen.push(...experts.slice(0, K).sort((a, b) => a - b));
  }
  return r.of([T, K], chosen, "u32");
}

const hosted = (r: Draw, { offsets, slot_token, token_slot, spare }: ref.Plan) => ({
  offsets: r.of(offsets.shape, [...offsets.data], "u32"),
  slot_token: r.of(slot_token.shape, [...slot_token.data], "u32"),
  token_slot: r.of(token_slot.shape, [...token_slot.data], "u32"),
  ...(spare ? { spare } : {}),
});

const plan = (r: Draw, T: number, K: number, E: number, part?: PlanPart, groups = E) =>
  hosted(r, ref.moe_plan(choices(r, T, K, E), groups, part));

/** A plan with limits, in which some slots have no choice. */
const limited = (r: Draw, T: number, K: number, E: number, options: LimitOptions) =>
  hosted(r, ref.moe_limit(ref.moe_plan(choices(r, T, K, E), E), r.uniform([T, K]), options));
/** As many rows as a plan of `limited` has. */
const rowsFor = (r: Draw, { slot_token }: { slot_token: HostTensor }, D: number) =>
  r.normal([slot_token.shape[0]!, D]);
/** T tokens with K of E experts. */
const limit = (T: number, K: number, E: number, options: LimitOptions) => (r: Draw) => [
  plan(r, T, K, E), r.uniform([T, K]), options,
];
const TIGHT: LimitOptions = { capacity: 5 };

/** Plans of experts 3 to 5 of eight, with more slots than choices of them, and too few. */
const few = (r: Draw, T: number, slots = 3 * T) => plan(r, T, 3, 8, { first: 3, slots }, 3);

export default [
  opSamples({
    op: expert_load, reference: ref.expert_load,
    samples: [
      { name: "no tokens", args: (r) => [r.of([4], [0, 0, 0, 0], "u32"), choices(r, 0, 2, 4)] },
      {
        name: "one token", args: (r) => [r.of([9], [0, 0, 0, 0, 0, 0, 0, 0, 0], "u32"), choices(r, 1, 3, 9)],
      },
      {
        name: "all to one expert",
        args: (r) => [r.of([5], [0, 0, 0, 0, 0], "u32"), r.integers([200, 1], 3, 4, "u32")],
      },
      {
        name: "added to earlier counts, odd sizes",
        args: (r) => [r.integers([13], 0, 99, "u32"), choices(r, 333, 3, 13)],
      },
    ],
    errors: [{
      name: "no experts", args: (r) => [r.of([0], [], "u32"), choices(r, 1, 1, 1)],
      message: /expert_load.*counts must be.*found \[0\]/,
    }],
  }),
  opSamples({
    op: update_expert_bias, reference: ref.update_expert_bias,
    samples: [
      {
        name: "busy, idle and balanced",
        args: (r) => [r.normal([4], 0.1), r.of([4], [5, 3, 1, 3], "u32"), 1e-3],
      },
      {
        name: "a mean between two counts",
        args: (r) => [r.normal([3], 0.1), r.of([3], [2, 2, 1], "u32"), 1e-3],
      },
      {
        name: "no tokens at all", args: (r) => [r.normal([5], 0.1), r.of([5], [0, 0, 0, 0, 0], "u32"), 1e-3],
      },
      {
        name: "large counts",
        args: (r) => [r.normal([2], 0.1), r.of([2], [2000000001, 2000000000], "u32"), 1e-3],
      },
      {
        name: "an open gate",
        args: (r) => [r.normal([3], 0.1), r.of([3], [4, 2, 1], "u32"), 1e-3, r.of([1], [0])],
      },
      {
        name: "a closed gate",
        args: (r) => [r.normal([3], 0.1), r.of([3], [4, 2, 1], "u32"), 1e-3, r.of([1], [-1])],
      },
      { name: "512 experts", args: (r) => [r.normal([512], 0.1), r.integers([512], 0, 9, "u32"), 1e-3] },
    ],
    errors: [
      {
        name: "counts of another width",
        args: (r) => [r.normal([4]), r.integers([3], 0, 9, "u32"), 1], message: /counts.*\[4\].*\[3\]/,
      },
      {
        name: "several gates",
        args: (r) => [r.normal([4]), r.integers([4], 0, 9, "u32"), 1, r.normal([2])],
        message: /update_expert_bias.*gate.*\[1\].*\[2\]/,
      },
    ],
  }),
  opSamples({
    op: moe_plan, reference: ref.moe_plan,
    samples: [
      { name: "no tokens", args: (r) => [choices(r, 0, 2, 4), 4] },
      { name: "one token", args: (r) => [choices(r, 1, 22, 512), 512] },
      { name: "the most choices of the small kernel", args: (r) => [choices(r, 60, 2, 16), 16] },
      { name: "the fewest of the large one", args: (r) => [choices(r, 64, 2, 16), 16] },
      { name: "one expert", args: (r) => [choices(r, 300, 1, 1), 1] },
      { name: "experts without tokens", args: (r) => [r.integers([777, 1], 3, 5, "u32"), 40] },
      { name: "odd sizes", args: (r) => [choices(r, 701, 3, 37), 37] },
      { name: "512 experts", args: (r) => [choices(r, 300, 22, 512), 512] },
      { name: "some experts", args: (r) => [choices(r, 29, 3, 16), 4, { first: 8, slots: 87 }] },
      {
        name: "the last experts, few slots",
        args: (r) => [choices(r, 64, 3, 16), 4, { first: 12, slots: 9 }],
      },
      {
        name: "the first experts of many",
        args: (r) => [choices(r, 2000, 3, 48), 7, { first: 0, slots: 6000 }],
      },
      { name: "no such expert", args: (r) => [r.integers([9, 2], 0, 3, "u32"), 2, { first: 4, slots: 18 }] },
      { name: "blocks of experts", args: (r) => [choices(r, 29, 4, 12), 3, { block: 4, slots: 87 }] },
      {
        name: "blocks of experts, every third choice dropped",
        args: (r) => {
          const { data } = choices(r, 29, 5, 12);
          const kept = Array.from(data, (e, i) => (i % 3 === 1 ? 0xffffffff : e));
          return [r.of([29, 5], kept, "u32"), 3, { block: 4, slots: 87 }];
        },
      },
      { name: "blocks of many", args: (r) => [choices(r, 2000, 3, 48), 6, { block: 8, slots: 6000 }] },
    ],
    errors: [
      {
        name: "a flat list",
        args: (r) => [r.integers([4], 0, 2, "u32"), 2], message: /moe_plan.*topk_idx.*\[T, K\].*\[4\]/,
      },
    ],
  }),
  opSamples({
    op: moe_permute, reference: ref.moe_permute, vjp: ref.moe_permute_vjp,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 8]), plan(r, 0, 2, 4), 2] },
      { name: "no columns", args: (r) => [r.normal([3, 0]), plan(r, 3, 2, 4), 2] },
      { name: "one token", args: (r) => [r.normal([1, 12]), plan(r, 1, 3, 5), 3] },
      { name: "odd width", args: (r) => [r.normal([37, 77]), plan(r, 37, 3, 7), 3] },
      { name: "wide rows", args: (r) => [r.normal([19, 300]), plan(r, 19, 2, 8), 2] },
      { name: "one choice each", args: (r) => [r.normal([33, 20]), plan(r, 33, 1, 4), 1] },
      { name: "whole numbers", args: (r) => [r.integers([19, 8], 0, 99, "u32"), plan(r, 19, 2, 8), 2] },
      { name: "odd whole numbers", args: (r) => [r.integers([19, 3], 0, 99, "u32"), few(r, 19), 3] },
      { name: "some experts", args: (r) => [r.normal([19, 20]), few(r, 19), 3] },
      { name: "some experts, odd width", args: (r) => [r.normal([19, 13]), few(r, 19), 3] },
      { name: "some experts, few slots", args: (r) => [r.normal([19, 20]), few(r, 19, 7), 3] },
      { name: "dropped choices", args: (r) => [r.normal([37, 77]), limited(r, 37, 3, 7, TIGHT), 3] },
      {
        name: "slots without a choice",
        args: (r) => [r.normal([19, 20]), limited(r, 19, 2, 8, { capacity: 6, pad: true, align: 4 }), 2],
      },
      {
        name: "no tokens but slots",
        args: (r) => [r.normal([0, 8]), limited(r, 0, 2, 4, { capacity: 2, pad: true }), 2],
      },
    ],
    errors: [
      {
        name: "a plan of another size",
        args: (r) => [r.normal([3, 4]), plan(r, 2, 2, 4), 2], message: /moe_permute.*plan.*6 choices.*\[4\]/,
      },
    ],
  }),
  opSamples({
    op: moe_unpermute, reference: ref.moe_unpermute, vjp: ref.moe_unpermute_vjp,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 8]), r.normal([0, 2]), plan(r, 0, 2, 4)] },
      { name: "no columns", args: (r) => [r.normal([6, 0]), r.normal([3, 2]), plan(r, 3, 2, 4)] },
      { name: "one token", args: (r) => [r.normal([3, 12]), r.normal([1, 3]), plan(r, 1, 3, 5)] },
      {
        name: "odd width",
        args: (r) => [r.normal([111, 77]), r.normal([37, 3]), plan(r, 37, 3, 7)], reduction: 77,
      },
      {
        name: "wide rows",
        args: (r) => [r.normal([38, 300]), r.normal([19, 2]), plan(r, 19, 2, 8)], reduction: 300,
      },
      { name: "22 of 32", args: (r) => [r.normal([110, 4]), r.normal([5, 22]), plan(r, 5, 22, 32)] },
      {
        name: "added to a base",
        args: (r) => [r.normal([38, 100]), r.normal([19, 2]), plan(r, 19, 2, 8), r.normal([19, 100])],
      },
      {
        name: "added to a base, odd width",
        args: (r) => [r.normal([38, 77]), r.normal([19, 2]), plan(r, 19, 2, 8), r.normal([19, 77])],
      },
      { name: "without weights", args: (r) => [r.normal([38, 20]), 2, plan(r, 19, 2, 8)] },
      { name: "some experts", args: (r) => [r.normal([57, 20]), r.normal([19, 3]), few(r, 19)] },
      { name: "some experts, odd width", args: (r) => [r.normal([57, 13]), r.normal([19, 3]), few(r, 19)] },
      { name: "some experts, few slots", args: (r) => [r.normal([7, 20]), r.normal([19, 3]), few(r, 19, 7)] },
      {
        name: "some experts, without weights, added to a base",
        args: (r) => [r.normal([57, 20]), 3, few(r, 19), r.normal([19, 20])],
      },
      ...[{ D: 100, name: "" }, { D: 77, name: ", odd width" }].map(({ D, name }) => ({
        name: `dropped choices${name}`, args: (r: Draw) => {
          const tight = limited(r, 19, 2, 8, { capacity: 3 });
          return [rowsFor(r, tight, D), r.normal([19, 2]), tight, r.normal([19, D])];
        }, reduction: D,
      })),
      {
        name: "slots without a choice, without weights", args: (r) => {
          const padded = limited(r, 19, 2, 8, { capacity: null, align: 4 });
          return [rowsFor(r, padded, 24), 2, padded, r.normal([19, 24])];
        },
      },
    ],
    errors: [
      {
        name: "a base of another shape",
        args: (r) => [r.normal([6, 4]), r.normal([3, 2]), plan(r, 3, 2, 4), r.normal([3, 5])],
        message: /moe_unpermute.*base.*\[3, 4\].*\[3, 5\]/,
      },
      {
        name: "rows that do not match the weights",
        args: (r) => [r.normal([5, 4]), r.normal([3, 2]), plan(r, 3, 2, 4)],
        message: /moe_unpermute.*y.*\[6, D\].*\[5, 4\]/,
      },
      {
        name: "a plan of another size",
        args: (r) => [r.normal([6, 4]), r.normal([3, 2]), plan(r, 2, 2, 4)],
        message: /moe_unpermute.*plan.*6 choices.*\[4\]/,
      },
    ],
  }),
  opSamples({
    op: keep_choices, reference: ref.keep_choices,
    samples: [0, 1, 37].map((T) => ({
      name: `${T} tokens`, args: (r) => {
        const index = choices(r, T, 3, 7);
        return [index, hosted(r, ref.moe_limit(ref.moe_plan(index, 7), r.uniform([T, 3]), { capacity: 4 }))];
      },
    })),
    errors: [{
      name: "a plan of other tokens",
      args: (r) => [choices(r, 3, 2, 4), limited(r, 2, 2, 4, TIGHT)],
      message: /keep_choices.*plan must be one of 6 choices/,
    }],
  }),
  opSamples({
    op: moe_limit, reference: ref.moe_limit,
    samples: [
      { name: "no tokens", args: limit(0, 2, 4, TIGHT) },
      { name: "no tokens, padded", args: limit(0, 2, 4, { capacity: 3, pad: true }) },
      { name: "one token", args: limit(1, 3, 5, TIGHT) },
      { name: "the largest weights", args: limit(37, 3, 7, TIGHT) },
      { name: "the first tokens", args: limit(37, 3, 7, { ...TIGHT, policy: "position" }) },
      {
        name: "equal weights: the first tokens",
        args: (r) => [plan(r, 37, 3, 7), r.of([37, 3], Array(111).fill(0.25)), TIGHT],
      },
      { name: "padded to the capacity", args: limit(37, 3, 7, { capacity: 17, pad: true }) },
      {
        name: "padded to the capacity and aligned",
        args: limit(37, 3, 7, { capacity: 17, pad: true, align: 8 }),
      },
      { name: "aligned", args: limit(37, 3, 7, { capacity: null, align: 16 }) },
      { name: "limited and aligned", args: limit(37, 3, 7, { capacity: 13, align: 4 }) },
      { name: "more than any needs", args: limit(9, 2, 6, { capacity: 9 }) },
      { name: "512 experts", args: limit(70, 22, 512, { capacity: 2 }) },
      {
        name: "a part of the experts",
        args: (r) => [few(r, 21), r.uniform([21, 3]), { capacity: 6, align: 4 }],
      },
      {
        name: "a part without slots for all, padded",
        args: (r) => [few(r, 21, 11), r.uniform([21, 3]), { capacity: 9, pad: true }],
      },
      {
        name: "all to one expert",
        args: (r) => [
          hosted(r, ref.moe_plan(r.integers([200, 1], 3, 4, "u32"), 5)), r.uniform([200, 1]),
          { capacity: 70 },
        ],
      },
    ],
    errors: [
      {
        name: "weights of other tokens", args: (r) => [plan(r, 3, 2, 4), r.normal([2, 2]), TIGHT],
        message: /moe_limit.*topk_weight.*6 choices.*\[2, 2\]/,
      },
      {
        name: "no capacity", args: limit(3, 2, 4, { capacity: 0 }),
        message: /moe_limit.*capacity.*above 0.*0/,
      },
      {
        name: "no capacity to pad to", args: limit(3, 2, 4, { capacity: null, pad: true }),
        message: /moe_limit.*pad needs a capacity.*none/,
      },
      {
        name: "multiples of a part", args: limit(3, 2, 4, { capacity: 1, align: 1.5 }),
        message: /moe_limit.*align.*whole number.*1.5/,
      },
    ],
  }),
  opSamples({
    op: moe_weigh, reference: ref.moe_weigh, vjp: ref.moe_weigh_vjp,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 8]), r.normal([0, 2]), plan(r, 0, 2, 4)] },
      { name: "no columns", args: (r) => [r.normal([6, 0]), r.normal([3, 2]), plan(r, 3, 2, 4)] },
      { name: "one token", args: (r) => [r.normal([3, 12]), r.normal([1, 3]), plan(r, 1, 3, 5)] },
      {
        name: "odd width",
        args: (r) => [r.normal([111, 77]), r.normal([37, 3]), plan(r, 37, 3, 7)], reduction: 77,
      },
      {
        name: "wide rows", args: (r) => [r.normal([38, 300]), r.normal([19, 2]), plan(r, 19, 2, 8)],
        reduction: 300,
      },
      {
        name: "dropped choices", args: (r) => {
          const tight = limited(r, 19, 2, 8, { capacity: 3 });
          return [rowsFor(r, tight, 20), r.normal([19, 2]), tight];
        },
      },
      {
        name: "slots without a choice", args: (r) => {
          const padded = limited(r, 19, 2, 8, { capacity: 4, pad: true, align: 8 });
          return [rowsFor(r, padded, 9), r.normal([19, 2]), padded];
        },
      },
    ],
    errors: [
      {
        name: "rows of another plan", args: (r) => [r.normal([5, 4]), r.normal([3, 2]), plan(r, 3, 2, 4)],
        message: /moe_weigh.*x.*\[6, D\].*\[5, 4\]/,
      },
      {
        name: "weights of other tokens", args: (r) => [r.normal([6, 4]), r.normal([2, 2]), plan(r, 3, 2, 4)],
        message: /moe_weigh.*topk_weight.*6 choices.*\[2, 2\]/,
      },
    ],
  }),
];
