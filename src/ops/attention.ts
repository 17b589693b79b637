import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import {
  attend, attendBackward, type AttentionCall, type Attended, type Documents, listed, resized, type Sight,
  statistics, widened,
} from "./attention_kernels.ts";
import { defineOp } from "./op.ts";

export interface AttentionOptions {
  /** Multiplies the scores, usually 1 / sqrt(Dh). */
  readonly scale: number;
  /**
   * i32 [B, L] of document numbers, or null. A query sees only keys of its own number; those of keys are the
   * same (then Lk = L), or in `kv_seq_idx`.
   */
  readonly seq_idx?: Tensor | null;
  /** i32 [B, Lk]: the document numbers of keys, where they are not those of queries. */
  readonly kv_seq_idx?: Tensor | null;
  /** Whether a query sees only keys up to its own position, as by default, or all of them. */
  readonly causal?: boolean;
  /**
   * Among the positions of the keys those of the first query of each half, where the queries are two
   * stretches of positions of L / 2 each; by default they are the last L.
   */
  readonly starts?: readonly [number, number];
  /** Which kernels compute it; default: those that suit the adapter. Teams need subgroups. */
  readonly kernel?: "team" | "tile";
}

interface Saved extends Attended {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly call: AttentionCall;
  /** Dh as the caller knows it. */
  readonly width: number;
}

function sightOf(L: number, Lk: number, { causal = true, starts }: AttentionOptions): Sight {
  if (starts) return { turn: L / 2, early: starts[0], reach: starts[1] - L / 2, limit: Lk };
  return { turn: 0, early: 0, reach: causal ? Lk - L : Lk, limit: Lk };
}

function documentsOf(seq_idx: Tensor | null, kv_seq_idx: Tensor | null): Documents | null {
  if (!seq_idx) return null;
  if (!kv_seq_idx) return { numbers: seq_idx, q_docs: 0, k_docs: 0 };
  return { numbers: listed([seq_idx, kv_seq_idx]), q_docs: 0, k_docs: seq_idx.size };
}

/**
 * softmax(scale * q k^T) v, causal or over all keys, with grouped key and value heads; no L x Lk matrix is
 * ever in memory.
 *
 * @param q  f32 [B, L, Hq, Dh], Dh at most 256; query t is at position t + (Lk - L) of the keys, or where
 *   `starts` says
 * @param k  f32 [B, Lk, Hkv, Dh], Lk >= L where causal, Hq a multiple of Hkv; v has the same shape. Query
 *   head h reads head floor(h / (Hq / Hkv))
 * @returns f32 [B, L, Hq, Dh]
 * @throws ShapeError for shapes that do not belong together
 *
 * Numerics  f32 throughout, online softmax; saves the log-sum-exp [B, Hq, L]. Sums have a fixed order.
 * Cost      2 B Hq L Lk Dh multiply-adds forward (half of it where causal with Lk = L), 3.5 times that
 * backward. Source    Dao 2023, FlashAttention-2 (arXiv 2307.08691).
 */
export const attention = defineOp({
  name: "attention",
  forward(ctx, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
    check(q.shape.length === 4, "attention", "q", "[B, L, Hq, Dh]", q);
    const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
    const [, Lk = 0, Hkv = 0] = k.shape;
    check(Dh <= 256, "attention", "the head width of q", "at most 256", q);
    const { seq_idx = null, kv_seq_idx = null, causal = true, starts } = options;
    check(
      k.shape.length === 4 && k.shape[0] === B && k.shape[3] === Dh && (Lk >= L || !causal), "attention", "k",
      `[${B}, ${causal ? `Lk >= ${L}` : "Lk"}, Hkv, ${Dh}]`, k,
    );
    check(v.shape.join() === k.shape.join(), "attention", "v", `[${k.shape.join(", ")}]`, v);
    const groups = Hkv > 0 ? Hq % Hkv === 0 : Hq === 0;
    check(groups, "attention", "the number of key heads", `a divisor of ${Hq}`, Hkv);
    if (seq_idx) {
      const fits = seq_idx.shape.join() === `${B},${L}` && (kv_seq_idx !== null || Lk === L);
      const expected = kv_seq_idx ? `[${B}, ${L}]` : `[${B}, ${Lk}] with Lk = L`;
      check(fits, "attention", "seq_idx", expected, seq_idx);
    }
    if (kv_seq_idx) {
      const fits = seq_idx !== null && kv_seq_idx.shape.join() === `${B},${Lk}`;
      check(fits, "attention", "kv_seq_idx", `[${B}, ${Lk}] beside seq_idx`, kv_seq_idx);
    }
    if (starts) {
      check(L % 2 === 0 && causal, "attention", "q", "an even number of causal queries with starts", q);
      const [first, second] = starts;
      const fits = first >= 0 && second >= first + L / 2 && second + L / 2 <= Lk;
      check(fits, "attention", "starts", `ascending, ${L / 2} apart and within ${Lk} positions`, starts);
    }
    const wide = { q: widened(q), k: widened(k), v: widened(v) };
    const call: AttentionCall = {
      scale: options.scale, sight: sightOf(L, Lk, options), documents: documentsOf(seq_idx, kv_seq_idx),
      kernel: options.kernel,
    };
    const { out, lse } = attend(wide.q, wide.k, wide.v, call);
    ctx.save({ ...wide, out, lse, call, width: Dh });
    return resized(out, Dh);
  },
  backward({ q, k, v, out, lse, call, width }: Saved, [grad], needs) {
    if (!grad) return [];
    const dout = widened(grad);
    const stats = statistics({ out, lse }, dout);
    const wants = { q: needs[0]!, kv: needs[1]! || needs[2]! };
    const { dq, dk, dv } = attendBackward({ q, k, v, dout, stats }, call, wants);
    return [dq, dk, dv].map((gradient) => gradient && resized(gradient, width));
  },
});
