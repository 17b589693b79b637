import { ndarray, type NdArray } from "../tensor/ndarray.ts";

type Grads = readonly (NdArray | null)[];

/** counts [E] plus the number of choices topk_idx [T, K] of each expert; numbers from E on do not count. */
export function expert_load(counts: NdArray, topk_idx: NdArray): NdArray {
  const sums = ndarray(counts.shape, counts.data.slice());
  for (const e of topk_idx.data) if (e < sums.data.length) sums.data[e]! += 1;
  return sums;
}

/**
 * bias_e + rate * sign(mean(counts) - counts_e): what `update_expert_bias` leaves in bias [E];
 * bias itself where gate [1] is negative.
 */
export function update_expert_bias(
  bias: NdArray, counts: NdArray, rate: number, gate: NdArray | null = null,
): NdArray {
  if (gate && gate.data[0]! < 0) return bias;
  const total = counts.data.reduce((a, b) => a + b, 0);
  // Compared as integers: a quotient could miss the balanced case.
  const sign = (e: number): number => Math.sign(total - counts.data[e]! * bias.data.length);
  return ndarray(bias.shape, bias.data.map((value, e) => value + rate * sign(e)));
}

/** In a plan with limits: a choice without a slot, or a slot without a choice. */
const NONE = 0xffffffff;

/** The T * K choices sorted by expert. */
export interface Plan {
  /** [E + 1]: expert e owns the sorted slots offsets[e] .. offsets[e + 1]. */
  readonly offsets: NdArray;
  /** [T * K], or some more or less of them with `spare`: sorted slot to choice t * K + k. */
  readonly slot_token: NdArray;
  /** [T * K]: choice to sorted slot. */
  readonly token_slot: NdArray;
  /** Whether choices from offsets[E] on, or without a slot, belong to no expert. */
  readonly spare?: boolean;
}

/** The experts first .. first + E - 1; or blocks of so many experts, each once per token. */
interface Part {
  readonly first?: number;
  readonly block?: number;
  readonly slots: number;
}

/**
 * Stable sort of the choices topk_idx [T, K] by expert; with `part` of some of them, and the others, in their
 * order, after all experts.
 */
export function moe_plan(topk_idx: NdArray, E: number, part?: Part): Plan {
  const K = topk_idx.shape[1]!;
  const { first = 0, block } = part ?? {};
  const blockOf = (choice: number): number => Math.floor(topk_idx.data[choice]! / block!);
  const groupOf = (choice: number): number => {
    if (block === undefined) return topk_idx.data[choice]! - first;
    let before = choice - 1;
    while (before >= choice - (choice % K) && topk_idx.data[before] === NONE) before--;
    const isFirst = before < choice - (choice % K) || blockOf(before) !== blockOf(choice);
    return isFirst ? blockOf(choice) : E;
  };
  const groups = Array.from(topk_idx.data, (_, choice) => {
    const group = groupOf(choice);
    return part && (group < 0 || group > E) ? E : group;
  });
  const offsets = ndarray([E + 1]);
  const slot_token = ndarray([topk_idx.data.length]);
  const token_slot = ndarray([topk_idx.data.length]);
  let slot = 0;
  for (let e = 0; e <= E; e++) {
    offsets.data[e] = slot;
    groups.forEach((group, choice) => {
      if (group !== e) return;
      slot_token.data[slot] = choice;
      token_slot.data[choice] = slot++;
    });
  }
  if (!part) return { offsets, slot_token, token_slot };
  const slots = Math.min(part.slots, slot_token.data.length);
  return { offsets, slot_token: ndarray([slots], slot_token.data.slice(0, slots)), token_slot, spare: true };
}

interface LimitOptions {
  readonly capacity: number | null;
  readonly policy?: "probs" | "position";
  readonly pad?: boolean;
  readonly align?: number;
}

/** The plan with at most `capacity` rows per expert, filled up to a multiple of `align` (`pad`: capacity). */
export function moe_limit(plan: Plan, topk_weight: NdArray, options: LimitOptions): Plan {
  const { capacity, policy = "probs", pad = false, align = 1 } = options;
  const E = plan.offsets.data.length - 1;
  const S = plan.token_slot.data.length;
  const held = plan.slot_token.data.length;
  const upTo = (n: number) => Math.ceil(n / align) * align;
  const most = E * upTo(capacity ?? held);
  const rows = pad ? most : Math.min(most, held + E * (align - 1));
  const offsets = ndarray([E + 1]);
  const slot_token = ndarray([rows], Array<number>(rows).fill(NONE));
  const token_slot = ndarray([S], Array<number>(S).fill(NONE));
  for (let e = 0; e < E; e++) {
    const choices = [...plan.slot_token.data.subarray(plan.offsets.data[e], plan.offsets.data[e + 1])];
    const weight = (choice: number) => topk_weight.data[choice]!;
    const byRank = policy === "probs" ? choices.toSorted((a, b) => weight(b) - weight(a) || a - b) : choices;
    const kept = byRank.slice(0, capacity ?? S).toSorted((a, b) => a - b);
    const begin = offsets.data[e]!;
    kept.forEach((choice, i) => {
      slot_token.data[begin + i] = choice;
      token_slot.data[choice] = begin + i;
    });
    offsets.data[e + 1] = begin + upTo(pad ? capacity! : kept.length);
  }
  return { offsets, slot_token, token_slot, spare: true };
}

/** topk_idx [T, K] without the choices that a plan has no slot for. */
export function keep_choices(topk_idx: NdArray, { token_slot }: Plan): NdArray {
  return ndarray(topk_idx.shape, topk_idx.data.map((e, i) => (token_slot.data[i] === NONE ? NONE : e)));
}

/** Calls `visit` for every slot that holds a choice. */
function forEachSlot(
  { offsets, slot_token, spare }: Plan, visit: (slot: number, choice: number) => void,
): void {
  const used = spare ? Math.min(offsets.data.at(-1)!, slot_token.data.length) : slot_token.data.length;
  for (let slot = 0; slot < used; slot++) {
    if (!spare || slot_token.data[slot] !== NONE) visit(slot, slot_token.data[slot]!);
  }
}

/** Rows of x [T, D] in sorted order: y [slots, D], y[slot] = x[floor(slot_token[slot] / K)]. */
export function moe_permute(x: NdArray, plan: Plan, K: number): NdArray {
  const D = x.shape[1]!;
  const y = ndarray([plan.slot_token.data.length, D]);
  forEachSlot(plan, (slot, choice) => {
    const t = Math.floor(choice / K);
    for (let d = 0; d < D; d++) y.data[slot * D + d] = x.data[t * D + d]!;
  });
  return y;
}

/** dx[t] = sum over the slots of token t of dy[slot]. */
export function moe_permute_vjp([dy]: Grads, x: NdArray, plan: Plan, K: number): (NdArray | null)[] {
  const D = x.shape[1]!;
  const dx = ndarray(x.shape);
  if (dy) {
    forEachSlot(plan, (slot, choice) => {
      const t = Math.floor(choice / K);
      for (let d = 0; d < D; d++) dx.data[t * D + d]! += dy.data[slot * D + d]!;
    });
  }
  return [dx, null, null];
}

/** Experts per token, and the weight of a choice. */
function weightsOf(weight: NdArray | number): { K: number; weightOf: (choice: number) => number } {
  if (typeof weight === "number") return { K: weight, weightOf: () => 1 };
  return { K: weight.shape[1]!, weightOf: (choice) => weight.data[choice]! };
}

/**
 * out[t] = sum_k topk_weight[t, k] * y[token_slot[t * K + k]]; y [slots, D], topk_weight [T, K] or the number
 * K, for weights of 1; [T, D].
 */
export function moe_unpermute(
  y: NdArray, topk_weight: NdArray | number, plan: Plan, base: NdArray | null = null,
): NdArray {
  const { K, weightOf } = weightsOf(topk_weight);
  const D = y.shape[1]!;
  const out = ndarray([plan.token_slot.data.length / K, D], base?.data.slice());
  forEachSlot(plan, (slot, choice) => {
    const t = Math.floor(choice / K);
    for (let d = 0; d < D; d++) out.data[t * D + d]! += weightOf(choice) * y.data[slot * D + d]!;
  });
  return out;
}

/** dy[slot] = topk_weight * dout[t]; dtopk_weight[t, k] = dot(dout[t], y[slot]). */
export function moe_unpermute_vjp(
  [dout]: Grads, y: NdArray, topk_weight: NdArray | number, plan: Plan, base: NdArray | null = null,
): (NdArray | null)[] {
  const { K, weightOf } = weightsOf(topk_weight);
  const D = y.shape[1]!;
  const dy = ndarray(y.shape);
  const dweight = typeof topk_weight === "number" ? null : ndarray(topk_weight.shape);
  if (dout) {
    forEachSlot(plan, (slot, choice) => {
      const t = Math.floor(choice / K);
      for (let d = 0; d < D; d++) {
        dy.data[slot * D + d] = weightOf(choice) * dout.data[t * D + d]!;
        if (dweight) dweight.data[choice]! += dout.data[t * D + d]! * y.data[slot * D + d]!;
      }
    });
  }
  return [dy, dweight, null, (base && dout) ?? null];
}

/** out[slot] = topk_weight[slot_token[slot]] * x[slot]; x [slots, D]. */
export function moe_weigh(x: NdArray, topk_weight: NdArray, plan: Plan): NdArray {
  const D = x.shape[1]!;
  const out = ndarray(x.shape);
  forEachSlot(plan, (slot, choice) => {
    for (let d = 0; d < D; d++) out.data[slot * D + d] = topk_weight.data[choice]! * x.data[slot * D + d]!;
  });
  return out;
}

/** dx[slot] = topk_weight * dout[slot]; dtopk_weight = dot(dout[slot], x[slot]). */
export function moe_weigh_vjp(
  [dout]: Grads, x: NdArray, topk_weight: NdArray, plan: Plan,
): (NdArray | null)[] {
  const D = x.shape[1]!;
  const dweight = ndarray(topk_weight.shape);
  if (!dout) return [ndarray(x.shape), dweight, null];
  forEachSlot(plan, (slot, choice) => {
    for (let d = 0; d < D; d++) dweight.data[choice]! += dout.data[slot * D + d]! * x.data[slot * D + d]!;
  });
  return [moe_weigh(dout, topk_weight, plan), dweight, null];
}
