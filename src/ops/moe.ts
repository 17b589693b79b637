import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** The T * K choices (t, k) of a router sorted by expert. */
export interface MoePlan {
  /** u32 [E + 1]: expert e owns the sorted slots offsets[e] .. offsets[e + 1]. */
  readonly offsets: Tensor;
  /** u32 [T * K]: sorted slot to choice t * K + k. */
  readonly slot_token: Tensor;
  /** u32 [T * K]: choice t * K + k to sorted slot. */
  readonly token_slot: Tensor;
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
  forward(_ctx, topk_idx: Tensor, E: number): [Tensor, Tensor, Tensor] {
    const { device, size: S } = topk_idx;
    check(topk_idx.shape.length === 2, "moe_plan", "topk_idx", "[T, K]", topk_idx);
    check(Number.isInteger(E) && E >= 1, "moe_plan", "E", "a whole number above 0", E);
    if (S === 0) return [device.zeros([E + 1], "u32"), device.zeros([0], "u32"), device.zeros([0], "u32")];
    const offsets = device.empty([E + 1], "u32");
    const slot_token = device.empty([S], "u32");
    const token_slot = device.empty([S], "u32");
    if (S * (S + E) <= 128 * 128) {
      launch("moe/plan", {
        entry: "small", bind: { topk_idx, offsets, slot_token, token_slot }, constants: { WG },
        params: { choices: S, experts: E, pieces: 1, length: S }, workgroups: [1],
      });
      return [offsets, slot_token, token_slot];
    }
    // Where launches cost more than a loop.
    if (S <= (device.info.isSoftware ? 4096 : E <= WG ? 1024 : 0)) {
      const histogram = device.empty([WG, E], "u32");
      launch("moe/plan", {
        entry: "whole", bind: { topk_idx, histogram, offsets, slot_token, token_slot }, constants: { WG },
        params: { choices: S, experts: E, pieces: WG, length: Math.ceil(S / WG) }, workgroups: [1],
      });
      return [offsets, slot_token, token_slot];
    }
    // More pieces share the work among more invocations, but each adds E counters to clear and to scan.
    const length = Math.max(16, Math.ceil(S / (device.info.isSoftware ? 128 : 512)));
    const pieces = Math.ceil(S / length);
    const histogram = device.zeros([pieces, E], "u32");
    const params = { choices: S, experts: E, pieces, length };
    const perPiece = groupsFor(pieces, PLAN_WG);
    launch("moe/plan", { entry: "count", bind: { topk_idx, histogram }, params, workgroups: perPiece });
    launch("moe/plan", {
      entry: "scan_pieces", bind: { histogram, offsets }, params, workgroups: groupsFor(E, PLAN_WG),
    });
    launch("moe/plan", { entry: "scan_experts", bind: { offsets }, params, workgroups: [1] });
    launch("moe/plan", {
      entry: "scatter", bind: { topk_idx, histogram, offsets, slot_token, token_slot }, params,
      workgroups: perPiece,
    });
    return [offsets, slot_token, token_slot];
  },
});

/**
 * Sorts the choices of a router by expert: a stable counting sort on the GPU, the same plan every time.
 *
 * @param topk_idx  u32 [T, K], experts 0 .. E - 1
 * @throws ShapeError for another rank
 */
export const moe_plan = Object.assign((topk_idx: Tensor, E: number): MoePlan => {
  const [offsets, slot_token, token_slot] = sortChoices(topk_idx, E);
  return { offsets: offsets!, slot_token: slot_token!, token_slot: token_slot! };
}, { opName: sortChoices.opName, mutates: sortChoices.mutates, differentiable: sortChoices.differentiable });

/** Rows of D values in the widest elements that fit, and how invocations share them. */
function columns(D: number, perInvocation: number): { cols: number; parts: number; conditions: ("vec4")[] } {
  const isWide = D % 4 === 0;
  const cols = isWide ? D / 4 : D;
  return { cols, parts: Math.max(1, Math.ceil(cols / perInvocation)), conditions: isWide ? ["vec4"] : [] };
}

function checkPlan(op: string, plan: MoePlan, slots: number): void {
  check(plan.slot_token.size === slots, op, "plan", `made for ${slots} choices`, plan.slot_token);
}

/**
 * Brings rows into expert order: y[slot] = x[floor(slot_token[slot] / K)].
 *
 * @param x  f32 [T, D]
 * @returns f32 [T * K, D]; backward adds the K gradients of a token in the order of k
 * @throws ShapeError for a plan of another size
 */
export const moe_permute = defineOp({
  name: "moe_permute",
  forward(ctx, x: Tensor, plan: MoePlan, K: number): Tensor {
    check(x.shape.length === 2, "moe_permute", "x", "[T, D]", x);
    const [T, D] = x.shape as [number, number];
    checkPlan("moe_permute", plan, T * K);
    const y = x.device.empty([T * K, D]);
    const { cols, parts, conditions } = columns(D, x.device.info.isSoftware ? 16 : 4);
    launch("moe/permute", {
      bind: { x, slot_token: plan.slot_token, y }, params: { slots: T * K, cols, parts, topk: K }, conditions,
      workgroups: groupsFor(T * K * parts),
    });
    ctx.save({ token_slot: plan.token_slot, shape: x.shape, K });
    return y;
  },
  backward(
    { token_slot, shape, K }: { token_slot: Tensor; shape: readonly number[]; K: number }, [dy], _needs, into,
  ) {
    if (!dy) return [];
    const dx = into.empty(0, { device: dy.device, shape });
    combine(dy, token_slot, null, into.soFar(0), dx, K);
    return [dx];
  },
});

/** out[t] = base[t] + sum of the rows of token t, times their weights where there are any. */
export function combine(
  y: Tensor, token_slot: Tensor, topk_weight: Tensor | null, base: Tensor | null, out: Tensor, topk: number,
): void {
  const [tokens, D] = out.shape as [number, number];
  const { cols, parts, conditions } = columns(D, out.device.info.isSoftware ? 16 : 4);
  launch("moe/combine", {
    // What is not read has to be bound all the same.
    bind: { y, token_slot, topk_weight: topk_weight ?? y, base: base ?? y, out },
    params: { tokens, cols, parts, topk },
    conditions: [
      ...conditions, ...(topk_weight ? ["weighted" as const] : []), ...(base ? ["based" as const] : []),
    ],
    workgroups: groupsFor(D === 0 ? 0 : tokens * parts),
  });
}

/**
 * Adds the rows of each token in the order of k: out[t] = base[t] + sum_k topk_weight[t, k] * y[slot], with
 * slot = token_slot[t * K + k].
 *
 * @param y            f32 [T * K, D], rows in expert order
 * @param topk_weight  f32 [T, K]
 * @param base         f32 [T, D], or null
 * @returns f32 [T, D]; differentiable in y, topk_weight and base
 * @throws ShapeError for row counts that do not belong together
 */
export const moe_unpermute = defineOp({
  name: "moe_unpermute",
  forward(ctx, y: Tensor, topk_weight: Tensor, plan: MoePlan, base: Tensor | null = null): Tensor {
    check(topk_weight.shape.length === 2, "moe_unpermute", "topk_weight", "[T, K]", topk_weight);
    const [T, K] = topk_weight.shape as [number, number];
    check(y.shape.length === 2 && y.shape[0] === T * K, "moe_unpermute", "y", `[${T * K}, D]`, y);
    checkPlan("moe_unpermute", plan, T * K);
    const shape = [T, y.shape[1]!];
    if (base) check(base.shape.join() === shape.join(), "moe_unpermute", "base", `[${shape.join(", ")}]`,
      base);
    const out = y.device.empty(shape);
    combine(y, plan.token_slot, topk_weight, base, out, K);
    ctx.save({ y, topk_weight, token_slot: plan.token_slot });
    return out;
  },
  backward(
    { y, topk_weight, token_slot }: { y: Tensor; topk_weight: Tensor; token_slot: Tensor }, [dout], needs,
  ) {
    if (!dout) return [];
    const dy = y.device.empty(y.shape);
    const dweight = y.device.empty(topk_weight.shape);
    const [choices, D] = y.shape as [number, number];
    const { cols, conditions } = columns(D, 1);
    const LANES = y.device.info.isSoftware ? 1 : 32;
    launch("moe/unpermute_backward", {
      bind: { y, topk_weight, token_slot, dout, dy, dweight },
      params: { choices, cols, topk: topk_weight.shape[1]! }, conditions, constants: { LANES },
      workgroups: groupsFor(choices * LANES),
    });
    return [dy, dweight, null, needs[3] ? dout : null];
  },
});
