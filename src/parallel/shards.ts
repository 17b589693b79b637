/**
 * How every parameter of a model is cut over the ranks of a layout, and put together again.
 *
 * Dense parameters are cut over tp, routed experts over ep (whole experts, contiguous) and etp (their width).
 * A cut names a dimension and the sections of it that are each cut by themselves: the rows of a Mamba-2
 * projection are [z | x | B | C | dt], and a rank holds its part of each of the five. Tested in
 * test/parallel/shards.test.ts.
 */
import type { Parameter } from "../models/checkpoint_names.ts";
import { innerSize } from "../models/config.ts";
import type { NemotronHConfig } from "../models/config.ts";
import { ConfigError, ShapeError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";

/** The axes that parameters are cut over. Pipeline stages hold whole layers; dp, cp and edp hold copies. */
export type ShardAxis = "tp" | "ep" | "etp";
/** Sizes of the axes: a Layout has them. */
export type ShardSizes = { readonly [axis in ShardAxis]: number };
/** Where a rank stands on the axes. */
export type ShardRank = { readonly [axis in ShardAxis]: number };

/** Values of a parameter in any format of one element per number. */
export type Values = Float32Array | Uint16Array | Uint8Array;

/** One dimension of a parameter, cut over one axis. */
export interface Cut {
  readonly axis: ShardAxis;
  readonly dim: number;
  /** Extents of the parts of the dimension that are cut one by one; their sum is its extent. */
  readonly sections: readonly number[];
  /** Ranks on the axis. */
  readonly ranks: number;
  /** Pieces there are: fewer than ranks where `ranks / pieces` neighbours hold the same one. */
  readonly pieces: number;
}

export interface Shard {
  readonly parameter: Parameter;
  /** True for routed experts, which live on the expert grid (etp, ep, edp); all others on tp, cp, dp. */
  readonly expert: boolean;
  /** What makes a rank's piece, in this order. */
  readonly cuts: readonly Cut[];
  /** Shape of one rank's piece, the same for all ranks. */
  readonly shape: readonly number[];
  /** Axes of the parameter's own grid along which all ranks hold the same. */
  readonly replicas: readonly ShardAxis[];
  /** How many neighbours on tp hold the same piece: tp where it is whole, tp / kv heads for keys. */
  readonly copies: number;
  /** Ranks whose pieces make the parameter: tp, or etp * ep. */
  readonly ranks: number;
  /** A rank's piece, as a copy. Throws ShapeError when `values` are not those of the whole parameter. */
  slice<V extends Values>(values: V, rank: ShardRank): V;
  /**
   * The whole parameter from the pieces of all `ranks` in the order of `indexOf`. Of equal pieces the
   * first is taken. Throws ShapeError for a wrong number or size of pieces.
   */
  join<V extends Values>(pieces: readonly V[]): V;
  /** Position of a rank among the pieces: its tp, or etp + ETP * ep. */
  indexOf(rank: ShardRank): number;
  /** The rank of that position; 0 on the axes of the other grid. */
  rankOf(index: number): ShardRank;
}

/**
 * How a parameter is cut under a layout.
 * Throws ConfigError when one of its dimensions does not divide.
 */
export function shardOf(parameter: Parameter, config: NemotronHConfig, layout: ShardSizes): Shard {
  const expert = parameter.kind === "expert";
  const cuts = expert ? expertCuts(parameter, layout) : denseCuts(parameter, config, layout.tp);
  const shape = [...parameter.shape];
  for (const { dim, sections, pieces } of cuts) shape[dim] = sum(sections) / pieces;
  const [inner, outer]: [ShardAxis, ShardAxis | null] = expert ? ["etp", "ep"] : ["tp", null];
  const ranks = layout[inner] * (outer ? layout[outer] : 1);
  const copies = expert ? 1 : layout.tp / (cuts[0]?.pieces ?? 1);
  const indexOf = (rank: ShardRank) => rank[inner] + (outer ? layout[inner] * rank[outer] : 0);
  const rankOf = (index: number): ShardRank => ({
    tp: 0, ep: 0, etp: 0, [inner]: index % layout[inner],
    ...(outer ? { [outer]: Math.floor(index / layout[inner]) } : {}),
  });
  return {
    parameter, expert, cuts, shape, copies, ranks, indexOf, rankOf,
    replicas: expert || cuts.length > 0 ? [] : ["tp"],
    slice(values, rank) {
      check(parameter, values.length, sizeOf(parameter.shape));
      let piece = values;
      const extents = [...parameter.shape];
      for (const cut of cuts) {
        piece = takePiece(piece, extents, cut, Math.floor((rank[cut.axis] * cut.pieces) / cut.ranks));
        extents[cut.dim]! /= cut.pieces;
      }
      return cuts.length === 0 ? copyOf(values) : piece;
    },
    join(pieces) {
      if (pieces.length !== ranks) {
        throw new ShapeError(`${parameter.name}: expected ${ranks} pieces, found ${pieces.length}`);
      }
      for (const piece of pieces) check(parameter, piece.length, sizeOf(shape));
      return joinFrom(0, pieces, [...parameter.shape]);
    },
  };

  /** Joins pieces that differ in the cuts from number `first` on. Cuts over the outer axis come first. */
  function joinFrom<V extends Values>(first: number, pieces: readonly V[], extents: number[]): V {
    const cut = cuts[first];
    if (!cut) return copyOf(pieces[0]!);
    const stride = cut.ranks / cut.pieces;
    const below = cuts.slice(first + 1).reduce((ranks, { ranks: more }) => ranks * more, 1);
    const local = extents.with(cut.dim, extents[cut.dim]! / cut.pieces);
    const parts = Array.from({ length: cut.pieces }, (_, i) =>
      joinFrom(first + 1, pieces.slice(i * stride * below, (i * stride + 1) * below), local));
    const whole = emptyLike(parts[0]!, sizeOf(extents));
    parts.forEach((part, i) => putPiece(whole, part, extents, cut, i));
    return whole;
  }
}

function expertCuts({ name, shape }: Parameter, { ep, etp }: ShardSizes): Cut[] {
  const [experts, rows, columns] = shape as readonly [number, number, number];
  const cuts: Cut[] = [];
  if (ep > 1) cuts.push(cut(name, "ep", 0, [experts], ep, "routed experts"));
  // The first projection is cut by its outputs, the second by its inputs: both are the experts' width.
  const dim = name.endsWith(".up_proj") ? 1 : 2;
  if (etp > 1) cuts.push(cut(name, "etp", dim, [dim === 1 ? rows : columns], etp, "the experts' width"));
  return cuts;
}

function denseCuts(parameter: Parameter, config: NemotronHConfig, tp: number): Cut[] {
  if (tp === 1) return [];
  const { name, shape } = parameter;
  const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim } = config;
  const { mamba_num_heads: mambaHeads, n_groups: groups } = config;
  const leaf = name.slice(name.indexOf(".mixer.") + 1);
  const over = (dimension: number, sections: readonly number[], what: string) =>
    [cut(name, "tp", dimension, sections, tp, what)];
  const wholeHeads = (count: number, what: string) => {
    if (count % tp !== 0) indivisible(name, "tp", tp, count, what);
  };
  const inner = innerSize(config);
  const state = groups * config.ssm_state_size;

  if (parameter.kind === "embedding" || parameter.kind === "head") {
    return over(0, shape.slice(0, 1), "the vocabulary");
  }
  switch (leaf) {
    case "mixer.in_proj.weight": case "mixer.in_proj.bias":
      wholeHeads(groups, "Mamba-2 groups");
      return over(0, [inner, inner, state, state, mambaHeads], "Mamba-2 heads");
    case "mixer.conv1d.weight": case "mixer.conv1d.bias":
      wholeHeads(groups, "Mamba-2 groups");
      return over(0, [inner, state, state], "Mamba-2 heads");
    case "mixer.A_log": case "mixer.D": case "mixer.dt_bias":
      return over(0, [mambaHeads], "Mamba-2 heads");
    case "mixer.norm.weight":
      wholeHeads(groups, "Mamba-2 groups");
      return over(0, [inner], "Mamba-2 channels");
    case "mixer.out_proj.weight":
      wholeHeads(mambaHeads, "Mamba-2 heads");
      return over(1, [inner], "Mamba-2 channels");
    case "mixer.q_proj.weight": case "mixer.q_proj.bias":
      wholeHeads(heads, "attention heads");
      return over(0, [heads * dim], "attention heads");
    case "mixer.k_proj.weight": case "mixer.k_proj.bias":
    case "mixer.v_proj.weight": case "mixer.v_proj.bias": {
      if (kv % tp !== 0 && tp % kv !== 0) indivisible(name, "tp", tp, kv, "key heads, or a multiple");
      // In one piece too: every rank has other queries of it, so that unlike a norm's its gradients differ.
      return [{ axis: "tp", dim: 0, sections: [kv * dim], ranks: tp, pieces: Math.min(tp, kv) }];
    }
    case "mixer.o_proj.weight":
      wholeHeads(heads, "attention heads");
      return over(1, [heads * dim], "attention heads");
    case "mixer.up_proj.weight": case "mixer.up_proj.bias":
    case "mixer.shared_experts.up_proj.weight": case "mixer.shared_experts.up_proj.bias":
      return over(0, shape.slice(0, 1), "the hidden width");
    case "mixer.down_proj.weight": case "mixer.shared_experts.down_proj.weight":
      return over(1, shape.slice(1), "the hidden width");
    default:
      // Norms, the router and its bias, latent projections, eh_proj, and the biases of row-parallel layers.
      return [];
  }
}

function cut(
  name: string, axis: ShardAxis, dim: number, sections: readonly number[], ranks: number, what: string,
): Cut {
  for (const extent of sections) if (extent % ranks !== 0) indivisible(name, axis, ranks, extent, what);
  return { axis, dim, sections, ranks, pieces: ranks };
}

function indivisible(name: string, axis: ShardAxis, ranks: number, extent: number, what: string): never {
  throw new ConfigError(`${axis}: expected a divisor of ${extent} (${what}; ${name}), found ${ranks}`);
}

function check({ name }: Parameter, found: number, expected: number): void {
  if (found !== expected) throw new ShapeError(`${name}: expected ${expected} values, found ${found}`);
}

/** Piece number `piece` of every section of a dimension, one section after the other. */
export function takePiece<V extends Values>(
  values: V, extents: readonly number[], cut: Cut, piece: number,
): V {
  const local = emptyLike(values, values.length / cut.pieces);
  walk(extents, cut, piece, (at, from, length) => local.set(values.subarray(from, from + length), at));
  return local;
}

/** Puts a piece where takePiece took it from. */
export function putPiece<V extends Values>(
  whole: V, part: V, extents: readonly number[], cut: Cut, piece: number,
): void {
  walk(extents, cut, piece, (at, from, length) => whole.set(part.subarray(at, at + length), from));
}

/** Calls `move` for every run of values that lies together in the whole and in the piece. */
function walk(
  extents: readonly number[], { dim, sections, pieces }: Cut, piece: number,
  move: (at: number, from: number, length: number) => void,
): void {
  const inner = sizeOf(extents.slice(dim + 1));
  const outer = sizeOf(extents.slice(0, dim));
  let at = 0;
  for (let o = 0; o < outer; o++) {
    let from = o * extents[dim]! * inner;
    for (const extent of sections) {
      const length = (extent / pieces) * inner;
      move(at, from + piece * length, length);
      at += length;
      from += extent * inner;
    }
  }
}

function emptyLike<V extends Values>(values: V, length: number): V {
  return new (values.constructor as new (length: number) => V)(length);
}

function copyOf<V extends Values>(values: V): V {
  const copy = emptyLike(values, values.length);
  copy.set(values);
  return copy;
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}
