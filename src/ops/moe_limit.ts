/** Plans of which every expert takes a limited number of rows, or a multiple of some number. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { MoePlan } from "./moe.ts";
import { defineOp } from "./op.ts";

/** Who stays where more tokens chose an expert than it takes: those of the largest weights, or the first. */
export const DROP_POLICIES = ["probs", "position"] as const;
export type DropPolicy = (typeof DROP_POLICIES)[number];

export interface LimitOptions {
  /** Most rows of an expert, from `expertCapacity`; null: all stay. */
  readonly capacity: number | null;
  /** Default: probs. Ties go to the earlier token. */
  readonly policy?: DropPolicy;
  /** Every expert gets `capacity` rows, used or not, so that no shape depends on the routing. */
  readonly pad?: boolean;
  /** Rows of an expert are filled up to a multiple of so many; default 1. */
  readonly align?: number;
}

const WG = 64;
const ANY = 0xffffffff;
const groupsFor = (count: number): [number] => [Math.ceil(count / WG)];

/** ceil(tokens * topk / experts * factor): rows of an expert, and at most one of each token. */
export function expertCapacity(tokens: number, topk: number, experts: number, factor: number): number {
  return Math.min(Math.ceil(((tokens * topk) / experts) * factor), tokens);
}

const limitChoices = defineOp({
  name: "moe_limit",
  forward(_ctx, plan: MoePlan, topk_weight: Tensor, options: LimitOptions): [Tensor, Tensor, Tensor] {
    const { capacity, policy = "probs", pad = false, align = 1 } = options;
    const { device } = topk_weight;
    const name = "moe_limit";
    const S = plan.token_slot.size;
    check(topk_weight.size === S, name, "topk_weight", `of ${S} choices`, topk_weight);
    const isCount = (n: number) => Number.isInteger(n) && n >= 1;
    check(capacity === null || isCount(capacity), name, "capacity", "a whole number above 0", capacity ?? 0);
    check(isCount(align), name, "align", "a whole number above 0", align);
    if (pad && capacity === null) throw new ShapeError(`${name}: to pad needs a capacity, found none.`);
    const E = plan.offsets.size - 1;
    const held = plan.slot_token.size;
    const full = E * Math.ceil((capacity ?? held) / align) * align;
    const rows = pad ? full : Math.min(full, held + E * (align - 1));
    const ends = device.empty([E + 1], "u32");
    const slots = device.empty([rows], "u32");
    const token_slot = device.empty([S], "u32");
    const stays = device.empty([S], "u32");
    const params = {
      choices: S, held, experts: E, rows, capacity: capacity ?? ANY, align,
      by_weight: policy === "probs" ? 1 : 0, pad: pad ? 1 : 0,
    };
    const { offsets, slot_token } = plan;
    launch("moe/capacity", {
      entry: "rank", bind: { offsets, slot_token, topk_weight, stays, slots, token_slot }, params,
      workgroups: groupsFor(Math.max(S, rows)),
    });
    launch("moe/capacity", { entry: "extents", bind: { offsets, ends }, params, workgroups: [1] });
    launch("moe/capacity", {
      entry: "scatter", bind: { offsets, slot_token, stays, ends, slots, token_slot }, params,
      workgroups: groupsFor(S),
    });
    return [ends, slots, token_slot];
  },
});

/**
 * A plan with at most `capacity` rows per expert, a multiple of `align` of them. Choices beyond are dropped:
 * their weights are not shared out among those that stay.
 *
 * There are as many slots as any routing can need, and those without a choice hold none of its rows.
 *
 * @param plan         from `moe_plan`, of all choices or of some
 * @param topk_weight  f32 [T, K]
 * @throws ShapeError for weights of other tokens, or a limit that is no count
 */
export const moe_limit = Object.assign(
  (plan: MoePlan, topk_weight: Tensor, options: LimitOptions): MoePlan => {
    const [offsets, slot_token, token_slot] = limitChoices(plan, topk_weight, options);
    return { offsets: offsets!, slot_token: slot_token!, token_slot: token_slot!, spare: true };
  },
  {
    opName: limitChoices.opName, mutates: limitChoices.mutates, differentiable: limitChoices.differentiable,
  });

/**
 * The choices of a router without those that a plan drops: 2^32 - 1 in their place, an expert of nobody.
 *
 * @param topk_idx  u32 [T, K]
 * @param plan      from `moe_limit`
 * @returns u32 [T, K]
 * @throws ShapeError for a plan of other choices
 */
export const keep_choices = defineOp({
  name: "keep_choices",
  forward(_ctx, topk_idx: Tensor, { token_slot }: MoePlan): Tensor {
    const choices = topk_idx.size;
    check(token_slot.size === choices, "keep_choices", "plan", `one of ${choices} choices`, token_slot);
    const kept_idx = topk_idx.device.empty(topk_idx.shape, "u32");
    launch("moe/capacity", {
      entry: "keep", bind: { topk_idx, token_slot, kept_idx },
      params: { choices, held: 0, experts: 0, rows: 0, capacity: 0, align: 1, by_weight: 0, pad: 0 },
      workgroups: groupsFor(choices),
    });
    return kept_idx;
  },
});
