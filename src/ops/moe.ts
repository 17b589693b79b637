import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** The T * K choices (t, k) of a router sorted by expert. */
export interface MoePlan {
  /** u32 [E + 1]: expert e owns the sorted slots offsets[e] .. offsets[e + 1]. */
  readonly offsets: Tensor;
  /** u32 [T * K], or with `spare` [S]: sorted slot to choice t * K + k. */
  readonly slot_token: Tensor;
  /** u32 [T * K]: choice t * K + k to sorted slot. */
  readonly token_slot: Tensor;
  /**
   * Whether some choices belong to no expert: then those alone count whose slot is below offsets[E] and S,
   * and slots from there on are empty; so are, in a plan of `moe_limit`, others in between.
   */
  readonly spare?: boolean;
}

/** Which choices of a router a plan takes. */
export interface PlanPart {
  /** The experts first .. first + E - 1, as 0 .. E - 1. */
  readonly first?: number;
  /** In place of experts, blocks of so many; of a token's choices in one block the first counts. */
  readonly block?: number;
  /** Slots there are at most. */
  readonly slots: number;
}

const WG = 64;
const PLAN_WG = 32;
const groupsFor = (count: number, width = WG): [number] => [Math.ceil(count / width)];

/**
 * counts_e += number of choices of expert e, in place: several micro-batches add up.
 *
 * @param counts    u32 [E], changed
 * @param topk_idx  u32 [T, K]; numbers from E on do not count
 */
export const expert_load = defineOp({
  name: "expert_load",
  mutates: [0],
  forward(_ctx, counts: Tensor, topk_idx: Tensor): Tensor[] {
    const E = counts.size;
    check(E >= 1 && counts.shape.length === 1, "expert_load", "counts", "[E] with an expert", counts);
    const params = { choices: topk_idx.size, per_row: Math.max(topk_idx.size, 1), experts: E };
    launch("moe/expert_load", { bind: { topk_idx, counts }, params, workgroups: groupsFor(topk_idx.size) });
    return [];
  },
});

/**
 * bias_e += rate * sign(mean(counts) - counts_e), in place: balances experts without a loss term.
 *
 * @param bias    f32 [E], changed
 * @param counts  u32 [E], of the whole batch
 * @param gate    f32 [1], negative: nothing changes; or null
 * @throws ShapeError when the widths differ
 */
export const update_expert_bias = defineOp({
  name: "update_expert_bias",
  mutates: [0],
  forward(_ctx, bias: Tensor, counts: Tensor, rate: number, gate: Tensor | null = null): Tensor[] {
    const E = bias.size;
    check(E >= 1 && bias.shape.length === 1, "update_expert_bias", "bias", "[E] with an expert", bias);
    check(counts.size === E, "update_expert_bias", "counts", `[${E}]`, counts);
    if (gate) check(gate.size === 1, "update_expert_bias", "gate", "[1]", gate);
    launch("moe/expert_bias", {
      bind: { bias, counts, gate: gate ?? counts }, params: { experts: E, rate },
      conditions: gate ? ["gated"] : [], workgroups: [1],
    });
    return [];
  },
});

const sortChoices = defineOp({
  name: "moe_plan",
  forward(_ctx, topk_idx: Tensor, groups: number, part: PlanPart | null): [Tensor, Tensor, Tensor] {
    const [offsets, slot_token, token_slot] = sorted(topk_idx, groups, part);
    if (!part) return [offsets, slot_token, token_slot];
    const slots = Math.min(part.slots, topk_idx.size);
    return [offsets.prefix([groups + 1]), slot_token.prefix([slots]), token_slot];
  },
});

function sorted(topk_idx: Tensor, groups: number, part: PlanPart | null): [Tensor, Tensor, Tensor] {
  const { device, size: S } = topk_idx;
  check(topk_idx.shape.length === 2, "moe_plan", "topk_idx", "[T, K]", topk_idx);
  check(Number.isInteger(groups) && groups >= 1, "moe_plan", "E", "a whole number above 0", groups);
  // Those that belong to nobody come last, as those of one expert more.
  const E = part ? groups + 1 : groups;
  const which = { first: part?.block ?? part?.first ?? 0, topk: topk_idx.shape[1]! };
  const conditions = part ? [part.block === undefined ? "part" as const : "blocks" as const] : [];
  if (S === 0) return [device.zeros([E + 1], "u32"), device.zeros([0], "u32"), device.zeros([0], "u32")];
  const offsets = device.empty([E + 1], "u32");
  const slot_token = device.empty([S], "u32");
  const token_slot = device.empty([S], "u32");
  if (S * (S + E) <= 128 * 128) {
    launch("moe/plan", {
      entry: "small", bind: { topk_idx, offsets, slot_token, token_slot }, constants: { WG },
      params: { choices: S, experts: E, pieces: 1, length: S, ...which }, conditions, workgroups: [1],
    });
    return [offsets, slot_token, token_slot];
  }
  // Where launches cost more than a loop.
  if (S <= (device.info.isSoftware ? 4096 : E <= WG ? 1024 : 0)) {
    const histogram = device.empty([WG, E], "u32");
    launch("moe/plan", {
      entry: "whole", bind: { topk_idx, histogram, offsets, slot_token, token_slot }, constants: { WG },
      params: { choices: S, experts: E, pieces: WG, length: Math.ceil(S / WG), ...which }, conditions,
      workgroups: [1],
    });
    return [offsets, slot_token, token_slot];
  }
  // More pieces share the work among more invocations, but each adds E counters to clear and to scan.
  const length = Math.max(16, Math.ceil(S / (device.info.isSoftware ? 128 : 512)));
  const pieces = Math.ceil(S / length);
  const histogram = device.zeros([pieces, E], "u32");
  const params = { choices: S, experts: E, pieces, length, ...which };
  const perPiece = groupsFor(pieces, PLAN_WG);
  launch("moe/plan", {
    entry: "count", bind: { topk_idx, histogram }, params, conditions, workgroups: perPiece,
  });
  launch("moe/plan", {
    entry: "scan_pieces", bind: { histogram, offsets }, params, workgroups: groupsFor(E, PLAN_WG),
  });
  launch("moe/plan", { entry: "scan_experts", bind: { offsets }, params, workgroups: [1] });
  launch("moe/plan", {
    entry: "scatter", bind: { topk_idx, histogram, offsets, slot_token, token_slot }, params, conditions,
    workgroups: perPiece,
  });
  return [offsets, slot_token, token_slot];
}

/**
 * Sorts the choices of a router by expert: a stable counting sort on the GPU, the same plan every time.
 *
 * @param topk_idx  u32 [T, K], experts 0 .. E - 1; with `part` any, ascending within a token but for those
 *   that `keep_choices` took out
 * @param part      sorts some of the choices only; the plan is a `spare` one
 * @throws ShapeError for another rank
 */
export const moe_plan = Object.assign((topk_idx: Tensor, E: number, part?: PlanPart): MoePlan => {
  const [offsets, slot_token, token_slot] = sortChoices(topk_idx, E, part ?? null);
  const plan = { offsets: offsets!, slot_token: slot_token!, token_slot: token_slot! };
  return part ? { ...plan, spare: true } : plan;
}, { opName: sortChoices.opName, mutates: sortChoices.mutates, differentiable: sortChoices.differentiable });

/** Rows of D values in the widest elements that fit, and how invocations share them. */
export function columns(
  D: number, perInvocation: number,
): { cols: number; parts: number; conditions: ("vec4")[] } {
  const isWide = D % 4 === 0;
  const cols = isWide ? D / 4 : D;
  return { cols, parts: Math.max(1, Math.ceil(cols / perInvocation)), conditions: isWide ? ["vec4"] : [] };
}

function checkPlan(op: string, { slot_token, token_slot, spare }: MoePlan, choices: number): void {
  check(token_slot.size === choices && (spare || slot_token.size === choices), op, "plan",
    `made for ${choices} choices`, spare ? token_slot : slot_token);
}

/** What kernels need to know of a plan with empty slots; the tensor of others is not read. */
function usedOf({ offsets, slot_token, spare }: MoePlan) {
  return {
    offsets: spare ? offsets : slot_token, experts: offsets.size - 1, slots: slot_token.size,
    conditions: spare ? ["spare" as const] : [],
  };
}

/**
 * Brings rows into expert order: y[slot] = x[floor(slot_token[slot] / K)]; empty slots are zero.
 *
 * @param x  f32 or u32 [T, D]
 * @returns [slots, D] of the same kind; backward adds the gradients of a token in the order of k
 * @throws ShapeError for a plan of another size
 */
export const moe_permute = defineOp({
  name: "moe_permute",
  forward(ctx, x: Tensor, plan: MoePlan, K: number): Tensor {
    check(x.shape.length === 2, "moe_permute", "x", "[T, D]", x);
    const [T, D] = x.shape as [number, number];
    checkPlan("moe_permute", plan, T * K);
    const { offsets, experts, slots, conditions: spare } = usedOf(plan);
    const y = x.device.empty([slots, D], x.dtype);
    const { cols, parts, conditions } = columns(D, x.device.info.isSoftware ? 16 : 4);
    launch("moe/permute", {
      bind: { x, slot_token: plan.slot_token, y, offsets }, params: { slots, cols, parts, topk: K, experts },
      conditions: [...conditions, ...spare, ...(x.dtype === "f32" ? [] : ["integers" as const])],
      workgroups: groupsFor(D === 0 ? 0 : slots * parts),
    });
    ctx.save({ plan, shape: x.shape, K });
    return y;
  },
  backward({ plan, shape, K }: { plan: MoePlan; shape: readonly number[]; K: number }, [dy], _needs, into) {
    if (!dy) return [];
    const dx = into.empty(0, { device: dy.device, shape });
    combine(dy, plan, null, into.soFar(0), dx, K);
    return [dx];
  },
});

/** out[t] = base[t] + sum of the rows of token t, times their weights where there are any. */
export function combine(
  y: Tensor, plan: MoePlan, topk_weight: Tensor | null, base: Tensor | null, out: Tensor, topk: number,
): void {
  const [tokens, D] = out.shape as [number, number];
  const { cols, parts, conditions } = columns(D, out.device.info.isSoftware ? 16 : 4);
  const { offsets, experts, slots, conditions: spare } = usedOf(plan);
  launch("moe/combine", {
    // What is not read has to be bound all the same.
    bind: {
      y, token_slot: plan.token_slot, topk_weight: topk_weight ?? y, base: base ?? y, out, offsets,
    },
    params: { tokens, cols, parts, topk, slots, experts },
    conditions: [
      ...conditions, ...spare, ...(topk_weight ? ["weighted" as const] : []),
      ...(base ? ["based" as const] : []),
    ],
    workgroups: groupsFor(D === 0 ? 0 : tokens * parts),
  });
}

/**
 * Adds the rows of each token in the order of k: out[t] = base[t] + sum_k topk_weight[t, k] * y[slot], with
 * slot = token_slot[t * K + k].
 *
 * @param y            f32 [slots, D], rows in expert order
 * @param topk_weight  f32 [T, K]; or K, for weights of 1
 * @param base         f32 [T, D], or null
 * @returns f32 [T, D]; differentiable in y, topk_weight and base
 * @throws ShapeError for row counts that do not belong together
 */
export const moe_unpermute = defineOp({
  name: "moe_unpermute",
  forward(ctx, y: Tensor, topk_weight: Tensor | number, plan: MoePlan, base: Tensor | null = null): Tensor {
    const name = "moe_unpermute";
    const weight = typeof topk_weight === "number" ? null : topk_weight;
    if (weight) check(weight.shape.length === 2, name, "topk_weight", "[T, K]", weight);
    const K = weight ? weight.shape[1]! : topk_weight as number;
    const choices = weight ? weight.size : plan.token_slot.size;
    const T = weight ? weight.shape[0]! : choices / K;
    check(Number.isInteger(T), name, "topk_weight", `a divisor of ${choices} choices`, K);
    const slots = plan.spare ? plan.slot_token.size : choices;
    check(y.shape.length === 2 && y.shape[0] === slots, name, "y", `[${slots}, D]`, y);
    checkPlan(name, plan, choices);
    const shape = [T, y.shape[1]!];
    if (base) check(base.shape.join() === shape.join(), name, "base", `[${shape.join(", ")}]`, base);
    const out = y.device.empty(shape);
    combine(y, plan, weight, base, out, K);
    ctx.save({ y: weight ? y : null, weight, plan, K });
    return out;
  },
  backward(
    { y, weight, plan, K }: { y: Tensor | null; weight: Tensor | null; plan: MoePlan; K: number },
    [dout], needs,
  ) {
    if (!dout) return [];
    const dbase = needs[3] ? dout : null;
    if (!y || !weight) return [moe_permute(dout, plan, K), null, null, dbase];
    const { offsets, experts, slots, conditions: spare } = usedOf(plan);
    const dy = plan.spare ? y.device.zeros(y.shape) : y.device.empty(y.shape);
    const dweight = y.device.empty(weight.shape);
    const choices = weight.size;
    const { cols, conditions } = columns(y.shape[1]!, 1);
    const LANES = y.device.info.isSoftware ? 1 : 32;
    launch("moe/unpermute_backward", {
      bind: { y, topk_weight: weight, token_slot: plan.token_slot, dout, dy, dweight, offsets },
      params: { choices, cols, topk: K, slots, experts }, conditions: [...conditions, ...spare],
      constants: { LANES }, workgroups: groupsFor(choices * LANES),
    });
    return [dy, dweight, null, dbase];
  },
});
