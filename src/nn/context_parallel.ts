/**
 * Context parallel: ranks that share the positions of a row. Of a row cut into 2 n stretches rank r of n
 * holds the stretches r and 2 n - 1 - r, so that causal attention is the same work for all of them.
 */
import { attention } from "../ops/attention.ts";
import { exchangeInGroup, forEachGroup, gatherFromGroup, type Group } from "../ops/collectives.ts";
import { ring_attention } from "../ops/ring_attention.ts";
import { type Range, take_ranges } from "../ops/take_ranges.ts";
import { zigzag_order } from "../ops/zigzag_order.ts";
import { ShapeError, UsageError } from "../tensor/errors.ts";
import { perRank } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type ContextKind, type Division, neighboursOf, placesIn, sizeOfGroup } from "./division.ts";

/**
 * The positions that every one of `ranks` holds of a row, ascending. Whatever belongs to a position is cut by
 * them: token ids, document numbers, and targets once they are shifted.
 *
 * @param length positions of the row, a multiple of 2 * ranks (of anything for one rank)
 * @throws ShapeError where it is not
 */
export function zigzag(ranks: number, length: number): number[][] {
  if (ranks === 1) return [Array.from({ length }, (_, position) => position)];
  const stretch = length / (2 * ranks);
  if (!Number.isInteger(stretch)) {
    throw new ShapeError(
      `A row that ${ranks} ranks share must have a multiple of ${2 * ranks} positions, found ${length}.`);
  }
  const from = (n: number) => Array.from({ length: stretch }, (_, i) => n * stretch + i);
  return Array.from({ length: ranks }, (_, rank) => [...from(rank), ...from(2 * ranks - 1 - rank)]);
}

/** @throws UsageError where ranks share the positions or the heads of a row: caches hold all of it. */
export function checkWholeRows({ cp, tp }: Division): void {
  for (const [what, group] of [["context", cp], ["tensor", tp]] as const) {
    if (sizeOfGroup(group) === 1) continue;
    throw new UsageError(
      `A cache needs rows that lie on one rank, found ${what} parallel ${sizeOfGroup(group)}.`);
  }
}

interface Scores {
  readonly scale: number;
  /** i32 [B, L], document numbers of the rank's own positions; they count for the whole row. Or null. */
  readonly seq_idx: Tensor | null;
}

type Attend = (q: Tensor, k: Tensor, v: Tensor, scores: Scores, cp: Group) => Tensor;

/** Queries stay, keys and values go round. */
const ring: Attend = (q, k, v, { scale, seq_idx }, cp) =>
  forEachGroup(seq_idx ? [q, k, v, seq_idx] : [q, k, v], cp, (call, [qs, ks, vs, numbers = null]) =>
    ring_attention({ ...call, scale, seq_idx: numbers }, ...qs!, ...ks!, ...vs!));

/** Keys and values of all positions on every rank. */
const allgather: Attend = (q, k, v, { scale, seq_idx }, cp) => {
  const ranks = sizeOfGroup(cp);
  const half = q.shape[1]! / 2;
  const starts = placesIn(cp).map((rank) => [rank * half, (2 * ranks - 1 - rank) * half] as const);
  return attention(q, gatheredRows(k, cp), gatheredRows(v, cp), {
    scale, seq_idx, kv_seq_idx: seq_idx && gatheredRows(seq_idx, cp), starts: perRank(starts),
  });
};

/** All positions of some heads, instead of some positions of all heads. */
const alltoall: Attend = (q, k, v, scores, cp) => overHeads(q, k, v, scores, cp, attention);

/**
 * Positions for heads among neighbours, which then are one rank of a ring: stretches of the neighbours i * n
 * to i * n + n - 1 are, in order, one from each end of the row again.
 */
const hierarchical: Attend = (q, k, v, scores, cp) => {
  const size = neighboursOf(sizeOfGroup(cp), k.shape[2]!);
  const [near, far] = [nearGroup(cp, size), farGroup(cp, size)];
  if (size === 1) return ring(q, k, v, scores, far);
  if (size === sizeOfGroup(cp)) return alltoall(q, k, v, scores, near);
  return overHeads(q, k, v, scores, near, (...all) => ring(...all, far));
};

/** Neighbours of a group, `size` together. */
function nearGroup({ members, ...rest }: Group, size: number): Group {
  return { ...rest, members: members.flatMap((ranks) => Array.from(
    { length: ranks.length / size }, (_, i) => ranks.slice(i * size, (i + 1) * size))) };
}

/** Of every `size` neighbours of a group those at the same place. */
function farGroup({ members, ...rest }: Group, size: number): Group {
  return { ...rest, members: members.flatMap((ranks) => Array.from(
    { length: size }, (_, i) => ranks.filter((_rank, place) => place % size === i))) };
}

/** `attend` with all positions of some heads. */
function overHeads(
  q: Tensor, k: Tensor, v: Tensor, { scale, seq_idx }: Scores, cp: Group,
  attend: (q: Tensor, k: Tensor, v: Tensor, scores: Scores) => Tensor,
): Tensor {
  const ranks = sizeOfGroup(cp);
  const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
  const Hkv = k.shape[2]!;
  checkDivides(`${Hq} attention heads`, Hq, ranks);
  const copies = sharing(`${Hkv} key heads`, Hkv, ranks).flatMap((head) => [...head]);
  const toHeads = (x: Tensor, heads: number) =>
    toWholeRows(x.reshape([B, L, heads * Dh]), cp).reshape([B, ranks * L, heads / ranks, Dh]);
  const keyHeads = (x: Tensor) => {
    if (copies.length === Hkv) return toHeads(x, Hkv);
    const columns = copies.map((head): Range => [head * Dh, Dh]);
    return toHeads(take_ranges(x.reshape([B, L, Hkv * Dh]), 2, columns), copies.length);
  };
  const out = attend(toHeads(q, Hq), keyHeads(k), keyHeads(v), {
    scale, seq_idx: seq_idx && gatheredRows(seq_idx, cp),
  });
  return toOwnPositions(out.reshape([B, ranks * L, (Hq / ranks) * Dh]), cp).reshape([B, L, Hq, Dh]);
}

const ATTEND: Readonly<Record<ContextKind, Attend>> = { ring, allgather, alltoall, hierarchical };

/**
 * Causal attention of rows whose positions the ranks of `division.cp` share.
 *
 * @param q f32 [B, L, Hq, Dh] of the rank's own positions; k and v [B, L, Hkv, Dh]
 * @returns f32 [B, L, Hq, Dh]
 * @throws ShapeError for an odd L, and with "alltoall" where the heads cannot be shared out
 */
export function attendOverRanks(
  q: Tensor, k: Tensor, v: Tensor, scores: Scores, { cp, cp_kind }: Division,
): Tensor {
  if (sizeOfGroup(cp) === 1) return attention(q, k, v, scores);
  return ATTEND[cp_kind](q, k, v, scores, cp);
}

/** What the convolution and the scan of a Mamba-2 layer read. */
export interface ScanInputs {
  /** [B, L, channels]: x of every head, B of every group, C of every group. */
  readonly xBC: Tensor;
  /** [B, L, H] */
  readonly dt: Tensor;
  readonly seq_idx: Tensor | null;
  /** [channels, window], [channels] */
  readonly conv_weight: Tensor;
  readonly conv_bias: Tensor | null;
  /** [H] each */
  readonly A_log: Tensor;
  readonly D: Tensor;
  readonly dt_bias: Tensor;
}

export interface ScanSizes {
  readonly nheads: number;
  readonly headdim: number;
  readonly ngroups: number;
  readonly dstate: number;
}

/**
 * Runs a scan over rows whose positions the ranks of `division.cp` share: every rank scans all positions of
 * some heads, with its part of the parameters, which are whole on every rank (the gradients of the other
 * parts are zeros). A group of heads that several ranks have in common goes to all of them.
 *
 * @param scan [B, L', H', P] of what it is given: all positions of some heads, or what a single rank has
 * @returns [B, L, H * P] for the rank's own positions
 * @throws ShapeError where heads or groups cannot be shared out
 */
export function scanOverRanks(
  inputs: ScanInputs, sizes: ScanSizes, { cp }: Division,
  scan: (inputs: ScanInputs, sizes: ScanSizes) => Tensor,
): Tensor {
  const { xBC, dt, seq_idx, conv_weight, conv_bias, A_log, D, dt_bias } = inputs;
  const { nheads: H, headdim: P, ngroups: G, dstate: N } = sizes;
  const [B, L] = dt.shape as [number, number, number];
  const ranks = sizeOfGroup(cp);
  if (ranks === 1) return scan(inputs, sizes).reshape([B, L, H * P]);
  checkDivides(`${H} Mamba heads`, H, ranks);
  const groups = sharing(`${G} groups of Mamba heads`, G, ranks);
  const heads = H / ranks;
  const channels = groups.map((own, rank): Range[] => {
    const [first, count] = [own[0]! * N, own.length * N];
    return [[rank * heads * P, heads * P], [H * P + first, count], [H * P + G * N + first, count]];
  });
  const places = placesIn(cp);
  const ownChannels = perRank(places.map((rank) => channels[rank]!));
  const ownHeads = perRank(places.map((rank): Range[] => [[rank * heads, heads]]));
  const y = scan({
    xBC: toWholeRows(take_ranges(xBC, 2, channels.flat()), cp),
    dt: toWholeRows(dt, cp),
    seq_idx: seq_idx && gatheredRows(seq_idx, cp),
    conv_weight: take_ranges(conv_weight, 0, ownChannels),
    conv_bias: conv_bias && take_ranges(conv_bias, 0, ownChannels),
    A_log: take_ranges(A_log, 0, ownHeads),
    D: take_ranges(D, 0, ownHeads),
    dt_bias: take_ranges(dt_bias, 0, ownHeads),
  }, { ...sizes, nheads: heads, ngroups: groups[0]!.length });
  return toOwnPositions(y.reshape([B, ranks * L, heads * P]), cp);
}

function checkDivides(what: string, count: number, ranks: number): void {
  if (count % ranks === 0) return;
  throw new ShapeError(`Context parallel cannot share ${what} out among ${ranks} ranks.`);
}

/** The numbers of what every rank gets of `count` things: ranges, or one of them for several ranks. */
function sharing(what: string, count: number, ranks: number): number[][] {
  if (ranks % count !== 0) checkDivides(what, count, ranks);
  const each = Math.max(1, count / ranks);
  return Array.from({ length: ranks }, (_, rank) =>
    Array.from({ length: each }, (_, i) => Math.floor((rank * count) / ranks) + i));
}

/** [B, L, C] -> [B, ranks * L, C / ranks]: all positions, in their order, of a part of the columns. */
function toWholeRows(x: Tensor, cp: Group): Tensor {
  return zigzag_order(exchangeInGroup(x, cp, "columns"), sizeOfGroup(cp), "sequence");
}

/** The way back. */
function toOwnPositions(x: Tensor, cp: Group): Tensor {
  return exchangeInGroup(zigzag_order(x, sizeOfGroup(cp), "ranks"), cp, "positions");
}

/** [B, L, ...] -> [B, ranks * L, ...]: all positions, in their order. */
function gatheredRows(x: Tensor, cp: Group): Tensor {
  return zigzag_order(gatherFromGroup(x, cp, 1, true), sizeOfGroup(cp), "sequence");
}
