import { asCommunication, asComputing } from "../gpu/lane.ts";
import { check } from "../tensor/check.ts";
import { scope } from "../tensor/scope.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { onDevice } from "../tensor/transfer.ts";
import {
  attend, attendBackward, type AttentionCall, type Attended, listed, merge, resized, statistics, widened,
} from "./attention_kernels.ts";
import { announce, type Call, checkAlike, circulated, whole } from "./collectives.ts";
import { accumulate } from "./elementwise.ts";
import { defineOp } from "./op.ts";

export interface RingAttentionOptions extends Call {
  /** Multiplies the scores, usually 1 / sqrt(Dh). */
  readonly scale: number;
  /** i32 [B, L] of document numbers of every rank, or null. A query sees only keys of its own number. */
  readonly seq_idx: readonly Tensor[] | null;
  /** Which kernels compute it; default: those that suit the adapter. */
  readonly kernel?: "team" | "tile";
}

/** q, k and v of the ranks of a group. */
type Heads = readonly Tensor[];

interface Saved {
  readonly options: RingAttentionOptions;
  readonly qs: Heads;
  readonly ks: Heads;
  readonly vs: Heads;
  readonly outs: Heads;
  readonly lses: readonly Tensor[];
  /** i32 [ranks, B, L], for every rank */
  readonly numbers: readonly Tensor[] | null;
  /** Dh as the caller knows it. */
  readonly width: number;
  /** Bytes of a rank's keys and values, and of its numbers. */
  readonly bytes: { readonly kv: number; readonly numbers: number };
}

/**
 * What queries of rank r see of the keys of rank s: their own up to themselves; of a rank before, whose first
 * stretch lies before both of r's and whose second behind them, all of the first; of a rank behind, whose
 * stretches both lie between r's, everything, but only from the second stretch of queries on.
 */
function callOf(
  { scale, kernel }: RingAttentionOptions, numbers: Tensor | null, [, L]: readonly number[], r: number,
  s: number,
): AttentionCall {
  const half = L! / 2;
  const sight = r === s ? { turn: 0, early: 0, reach: 0, limit: L! }
    : s < r ? { turn: 0, early: 0, reach: L!, limit: half }
      : { turn: half, early: -half, reach: L!, limit: L! };
  const each = numbers ? numbers.shape[1]! : 0;
  return {
    scale, kernel, sight, documents: numbers && { numbers, q_docs: r * each, k_docs: s * each },
  };
}

/**
 * A hop of the ring, in which every rank hands on so many bytes: puts the block of every rank s where it is
 * after so many hops, with rank s + hop (mod n).
 */
function handOn(
  options: RingAttentionOptions, lists: readonly Tensor[][], devices: readonly Device[], hop: number,
  bytes: number, backward: boolean,
): void {
  asCommunication(options.group, options.ranks, () => {
    const call = { ...options, algorithm: "ring" as const };
    announce("send", call, lists[0]!, devices.map(() => bytes), backward);
    for (const blocks of lists) {
      blocks.forEach((block, s) => {
        blocks[s] = onDevice(block, devices[(s + hop) % devices.length]!);
      });
    }
  });
}

/** The numbers of all ranks in one list, for every rank; ranks of one device share it. */
function numbersOfAll(lists: readonly Tensor[]): Tensor[] {
  const made = new Map<Device, Tensor>();
  return circulated(lists, "ring").map((here, rank) => {
    const { device } = lists[rank]!;
    const all = made.get(device) ?? listed(here);
    made.set(device, all);
    return all;
  });
}

/**
 * Causal attention of rows whose positions the ranks of a group share: rank r of n holds the stretches r and
 * 2 n - 1 - r of 2 n, as one row [B, L]. Queries stay, keys and values go round: after i hops rank r has
 * those of rank r - i (mod n), which are half a block of work for every rank, and merges what its queries
 * find there by log-sum-exp. The way back walks the hops in reverse with the final log-sum-exp, and the
 * gradients of keys and values travel with them, so that after n - 1 hops they are at home.
 *
 * @param options  the group, the scale, documents
 * @param qkv      q f32 [B, L, Hq, Dh] of every rank, then k [B, L, Hkv, Dh] of every rank, then v; L even
 * @returns f32 [B, L, Hq, Dh] for every rank
 * @throws ShapeError for shapes that do not belong together
 *
 * Numerics  f32; sums over ranks have a fixed order.
 * Sends     n (n - 1) times a rank's k, v and numbers, backward also the gradients of k and v. Ranks that
 *           share a device read the blocks where they lie.
 * Source    Liu et al. 2023, ring attention (arXiv 2310.01889), with the balanced order of stretches.
 */
export const ring_attention = defineOp({
  name: "ring_attention",
  forward(ctx, options: RingAttentionOptions, ...qkv: Tensor[]): Tensor[] {
    const n = options.ranks.length;
    const isWhole = qkv.length === 3 * n;
    check(isWhole, "ring_attention", "the number of tensors", `3 of each of ${n} ranks`, qkv.length);
    const [qs, ks, vs] = [qkv.slice(0, n), qkv.slice(n, 2 * n), qkv.slice(2 * n)];
    for (const xs of [qs, [...ks, ...vs]]) checkAlike("ring_attention", xs);
    const [q, k] = [qs[0]!, ks[0]!];
    check(q.shape.length === 4 && q.shape[3]! <= 256, "ring_attention", "q", "[B, L, Hq, Dh <= 256]", q);
    const [B, L, Hq, width] = q.shape as [number, number, number, number];
    check(L % 2 === 0, "ring_attention", "the positions of a rank", "two stretches of equal length", L);
    const fits = k.shape.length === 4 && k.shape[0] === B && k.shape[1] === L && k.shape[3] === width;
    check(fits, "ring_attention", "k", `[${B}, ${L}, Hkv, ${width}]`, k);
    const Hkv = k.shape[2]!;
    const groups = Hkv > 0 ? Hq % Hkv === 0 : Hq === 0;
    check(groups, "ring_attention", "the number of key heads", `a divisor of ${Hq}`, Hkv);
    for (const numbers of options.seq_idx ?? []) {
      check(numbers.shape.join() === `${B},${L}`, "ring_attention", "seq_idx", `[${B}, ${L}]`, numbers);
    }
    const devices = qs.map(({ device }) => device);
    const numbers = options.seq_idx && numbersOfAll(options.seq_idx).map((all) => all.reshape([n, B * L]));
    const [wideQs, wideKs, wideVs] = [qs.map(widened), ks.map(widened), vs.map(widened)];
    const as = <T>(r: number, body: () => T) => asComputing("ring_attention", options.ranks[r]!, body);
    const attendTo = (r: number, s: number): Attended =>
      attend(wideQs[r]!, wideKs[s]!, wideVs[s]!, callOf(options, numbers?.[r] ?? null, q.shape, r, s));
    const bytes = { kv: 2 * k.byteLength, numbers: options.seq_idx?.[0]!.byteLength ?? 0 };
    let all = wideQs.map((_, r) => as(r, () => attendTo(r, r)));
    for (let hop = 1; hop < n; hop++) {
      handOn(options, [wideKs, wideVs], devices, hop, bytes.kv + bytes.numbers, false);
      all = all.map((found, r) => as(r, () => scope(() => merge(found, attendTo(r, (r - hop + n) % n)))));
    }
    const outs = all.map(({ out }) => out);
    ctx.save({
      options, qs: wideQs, ks: wideKs, vs: wideVs, outs, lses: all.map(({ lse }) => lse), numbers, width,
      bytes,
    });
    return outs.map((out) => resized(out, width));
  },
  backward({ options, qs, ks, vs, outs, lses, numbers, width, bytes }: Saved, grads) {
    const n = qs.length;
    const devices = qs.map(({ device }) => device);
    const douts = whole(grads, devices).map(widened);
    const as = <T>(r: number, body: () => T) =>
      asComputing("ring_attention backward", options.ranks[r]!, body);
    const stats = outs.map((out, r) => as(r, () => statistics({ out, lse: lses[r]! }, douts[r]!)));
    const sums: { dq: Tensor[]; dk: Tensor[]; dv: Tensor[] } = { dq: [], dk: [], dv: [] };
    const travelling: Tensor[][] = [[...ks], [...vs]];
    const add = (to: Tensor[], i: number, part: Tensor): void => {
      if (to[i]) accumulate(to[i], part);
      else to[i] = part;
    };
    for (let hop = n - 1; hop >= 0; hop--) {
      // What came last is still here; with every hop back the blocks bring along what they gathered so far.
      if (hop < n - 1) {
        const lists = [...travelling, sums.dk, sums.dv];
        handOn(options, lists, devices, hop, 2 * bytes.kv + bytes.numbers, true);
      }
      for (let r = 0; r < n; r++) {
        as(r, () => scope(() => {
          const s = (r - hop + n) % n;
          const [k, v] = travelling.map((list) => list[s]!) as [Tensor, Tensor];
          const block = { q: qs[r]!, k, v, dout: douts[r]!, stats: stats[r]! };
          const call = callOf(options, numbers?.[r] ?? null, qs[r]!.shape, r, s);
          const part = attendBackward(block, call, { q: true, kv: true });
          add(sums.dq, r, part.dq!);
          add(sums.dk, s, part.dk!);
          add(sums.dv, s, part.dv!);
          return hop === n - 1 ? part : null;
        }));
      }
    }
    return [null, ...[sums.dq, sums.dk, sums.dv].flat().map((gradient) => resized(gradient, width))];
  },
});
