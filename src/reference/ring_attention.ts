import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { attention, attention_vjp, type AttentionOptions } from "./attention.ts";
import { zigzag_order } from "./zigzag_order.ts";

interface RingOptions {
  readonly scale: number;
  /** i32 [B, L] of every rank. */
  readonly seq_idx: readonly NdArray[] | null;
}

/** The rows of all ranks, in the order of positions. */
function whole(parts: readonly NdArray[]): NdArray {
  const [B, L, ...rest] = parts[0]!.shape as [number, number, ...number[]];
  const width = parts[0]!.data.length / Math.max(B, 1);
  const all = ndarray([B, parts.length * L, ...rest]);
  parts.forEach(({ data }, rank) => {
    for (let b = 0; b < B; b++) {
      for (let i = 0; i < width; i++) all.data[(b * parts.length + rank) * width + i] = data[b * width + i]!;
    }
  });
  return zigzag_order(all, parts.length, "sequence");
}

/** Of a whole row's positions those of every rank. */
function parts(all: NdArray, ranks: number): NdArray[] {
  const { data, shape } = zigzag_order(all, ranks, "ranks");
  const [B, L, ...rest] = shape as [number, number, ...number[]];
  const width = data.length / Math.max(B * ranks, 1);
  return Array.from({ length: ranks }, (_, rank) => {
    const part = ndarray([B, L / ranks, ...rest]);
    for (let b = 0; b < B; b++) {
      for (let i = 0; i < width; i++) part.data[b * width + i] = data[(b * ranks + rank) * width + i]!;
    }
    return part;
  });
}

function joined({ scale, seq_idx }: RingOptions, qkv: readonly NdArray[]) {
  const ranks = qkv.length / 3;
  const [q, k, v] = [0, 1, 2].map((i) => whole(qkv.slice(i * ranks, (i + 1) * ranks)));
  const options: AttentionOptions = { scale, seq_idx: seq_idx && whole(seq_idx) };
  return { ranks, q: q!, k: k!, v: v!, options };
}

/**
 * Causal attention of rows whose positions the ranks of a group share: rank r holds the stretches r and
 * 2 n - 1 - r of 2 n.
 * @param qkv q of every rank, then k of every rank, then v
 */
export function ring_attention(options: RingOptions, ...qkv: NdArray[]): NdArray[] {
  const { ranks, q, k, v, options: all } = joined(options, qkv);
  return parts(attention(q, k, v, all), ranks);
}

export function ring_attention_vjp(
  grads: readonly (NdArray | null)[], options: RingOptions, ...qkv: NdArray[]
): (NdArray | null)[] {
  const { ranks, q, k, v, options: all } = joined(options, qkv);
  const dout = whole(grads.map((grad, rank) => grad ?? ndarray(qkv[rank]!.shape)));
  const gradients = attention_vjp([dout], q, k, v, all);
  return [null, ...gradients.slice(0, 3).flatMap((gradient) => parts(gradient!, ranks))];
}
