import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { checkSeqIdx, checkShape, documents, groups, quads, rangeAt, sumRows } from "./chunking.ts";
import { defineOp } from "./op.ts";

const SPAN = 16;
const SPAN_BACKWARD = 32;
const MAX_TAPS = 4; // the kernels slide a window of four inputs

/** The link-time conditions for arguments that may be null, and what is bound in their place. */
function optional(weight: Tensor, bias: Tensor | null, initial_state: Tensor | null, seq_idx: Tensor | null) {
  return {
    conditions: [
      ...(bias ? ["bias" as const] : []), ...(initial_state ? ["initial" as const] : []),
      ...documents(seq_idx),
    ],
    bias: bias ?? weight,
    initial_state: initial_state ?? weight,
    seq_idx: seq_idx ?? weight,
  };
}

/**
 * y[t,c] = silu(bias[c] + sum_j weight[c,j] x[t-K+1+j, c]): a causal depthwise convolution.
 *
 * @param x             (B, L, C) f32
 * @param weight        (C, K) f32, K from 1 to 4; weight[c, K-1] multiplies the current position
 * @param bias          (C) f32 or null
 * @param initial_state (B, C, K) f32, the K inputs before the row, newest last (K-1 matter), or null for
 *                      zeros; no gradient
 * @param seq_idx       (B, L) i32 or null; a change of value starts a document, and inputs of another count
 *                      as zero
 * @param wants_state   false: without final_state
 * @returns             y (B, L, C) and final_state (B, C, K): the last K inputs, oldest first
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 7.
 * Tested   test/ops/causal_conv1d.samples.ts against reference/causal_conv1d.ts
 */
export const causal_conv1d = defineOp({
  name: "causal_conv1d",
  forward(
    ctx, x: Tensor, weight: Tensor, bias: Tensor | null, initial_state: Tensor | null, seq_idx: Tensor | null,
    wants_state = true,
  ) {
    const op = "causal_conv1d";
    check(x.shape.length === 3, op, "x", "[batch, seqlen, channels]", x);
    const [batch, seqlen, channels] = x.shape as [number, number, number];
    const taps = weight.shape[1] ?? 0;
    const fits = weight.shape.length === 2 && weight.shape[0] === channels && taps >= 1 && taps <= MAX_TAPS;
    check(fits, op, "weight", `[${channels}, K] with K from 1 to ${MAX_TAPS}`, weight);
    if (bias) checkShape(op, "bias", bias, [channels]);
    if (initial_state) checkShape(op, "initial_state", initial_state, [batch, channels, taps]);
    checkSeqIdx(op, seq_idx, batch, seqlen);
    const y = x.device.empty(x.shape);
    const { conditions, ...rest } = optional(weight, bias, initial_state, seq_idx);
    const total = batch * Math.ceil(seqlen / SPAN) * Math.ceil(channels / 4);
    launch("mamba2/causal_conv1d", {
      entry: "causal_conv1d", bind: { x, weight, ...rest, y }, params: { seqlen, channels, taps, total },
      constants: { SPAN }, conditions: [...conditions, ...quads(channels)], workgroups: groups(total),
    });
    ctx.save({ x, weight, bias, initial_state, seq_idx });
    if (!wants_state) return [y];
    const state = x.device.empty([batch, channels, taps]);
    launch("mamba2/causal_conv1d", {
      entry: "final_state", bind: { x, initial_state: rest.initial_state, seq_idx: rest.seq_idx, state },
      params: { seqlen, channels, taps, total: batch * channels },
      conditions: [...conditions, ...quads(channels)], workgroups: groups(batch * channels),
    });
    return [y, state];
  },
  backward({ x, weight, bias, initial_state, seq_idx }, [dy, dstate]) {
    const [batch, seqlen, channels] = x.shape as [number, number, number];
    const taps = weight.shape[1]!;
    const dx = x.device.empty(x.shape);
    const spans = batch * Math.ceil(seqlen / SPAN_BACKWARD);
    const bias_at = rangeAt(channels * taps);
    const part = x.device.empty([spans, bias_at + channels]);
    const { conditions, ...rest } = optional(weight, bias, initial_state, seq_idx);
    const total = spans * Math.ceil(channels / 4);
    launch("mamba2/causal_conv1d_backward", {
      entry: "causal_conv1d_backward",
      bind: { x, weight, ...rest, dy: dy ?? x.device.zeros(x.shape), dx, part },
      params: { seqlen, channels, taps, bias_at, total }, constants: { SPAN: SPAN_BACKWARD },
      conditions: [...conditions, ...quads(channels)], workgroups: groups(total),
    });
    if (dstate) {
      launch("mamba2/causal_conv1d_backward", {
        entry: "final_state_backward", bind: { seq_idx: rest.seq_idx, dx, dstate },
        params: { seqlen, channels, taps, bias_at, total: batch * channels },
        conditions: [...conditions, ...quads(channels)], workgroups: groups(batch * channels),
      });
    }
    const sums = sumRows(part, bias_at + (bias ? channels : 0));
    return [dx, sums.range(0, [channels, taps]), bias && sums.range(bias_at, [channels])];
  },
});

/**
 * One decode step: shifts xBC into `state` in place and returns silu(bias[c] + sum_j weight[c,j] state[c,j]).
 *
 * @param state  (B, C, K) f32, the last K inputs, oldest first; changed
 * @param xBC    (B, C) f32
 * @param weight (C, K) f32
 * @param bias   (C) f32 or null
 * @returns      (B, C) f32
 *
 * Throws   ShapeError for shapes that do not fit.
 * Tested   test/ops/causal_conv1d.samples.ts against reference/causal_conv1d.ts
 */
export const causal_conv1d_update = defineOp({
  name: "causal_conv1d_update",
  mutates: [0],
  forward(_ctx, state: Tensor, xBC: Tensor, weight: Tensor, bias: Tensor | null) {
    const op = "causal_conv1d_update";
    check(state.shape.length === 3, op, "state", "[batch, channels, K]", state);
    const [batch, channels, taps] = state.shape as [number, number, number];
    checkShape(op, "xBC", xBC, [batch, channels]);
    checkShape(op, "weight", weight, [channels, taps]);
    if (bias) checkShape(op, "bias", bias, [channels]);
    const y = xBC.device.empty(xBC.shape);
    const total = batch * channels;
    launch("mamba2/causal_conv1d_update", {
      bind: { state, x: xBC, weight, bias: bias ?? weight, y }, params: { channels, taps, total },
      conditions: bias ? ["bias"] : [], workgroups: groups(total),
    });
    return y;
  },
});
