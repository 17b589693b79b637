import { ALONE, type Group } from "../ops/collectives.ts";

/** How attention sees keys of positions that other ranks hold. */
export const CONTEXT_KINDS = ["ring", "allgather", "alltoall", "hierarchical"] as const;
export type ContextKind = (typeof CONTEXT_KINDS)[number];

/** How tokens reach their experts. */
export const DISPATCHERS = ["alltoall", "allgather", "flex"] as const;
export type DispatcherKind = (typeof DISPATCHERS)[number];

/**
 * Ranks that exchange positions for heads under "hierarchical": as many neighbours of `cp` as share out the
 * key heads without a copy. Keys go round among the rest.
 */
export function neighboursOf(cp: number, keyHeads: number): number {
  return keyHeads === 0 ? cp : neighboursOf(keyHeads, cp % keyHeads);
}

/**
 * How the work of a layer is divided among the ranks of a pipeline stage. Layers hold their rank's share of
 * the weights and run as on one device; what crosses between ranks goes through these groups.
 */
export interface Division {
  /** Ranks that share heads, channels, hidden units and vocabulary rows. */
  readonly tp: Group;
  /** Between such products every rank of `tp` holds a part of the positions only (sequence parallel). */
  readonly sp: boolean;
  /** Ranks that share the positions of a row: rank r holds parts r and 2 n - 1 - r of 2 n. */
  readonly cp: Group;
  readonly cp_kind: ContextKind;
  /** Ranks that share the experts, in contiguous ranges. */
  readonly ep: Group;
  /** Ranks that share the hidden units of every expert. */
  readonly etp: Group;
  readonly dispatcher: DispatcherKind;
  /**
   * Rows of tokens that a rank's experts have room for, as a multiple of those of a balanced load, tokens *
   * experts per token * ranks of `etp`. Without it for the most that can come.
   */
  readonly expert_budget?: number | undefined;
  /** Ranks that hold tokens of the same micro-batch, and those of all of an update. */
  readonly tokens: Group;
  readonly all_tokens: Group;
}

/** A single rank. */
export const SOLO: Division = {
  tp: ALONE, sp: false, cp: ALONE, cp_kind: "ring", ep: ALONE, etp: ALONE, dispatcher: "alltoall",
  tokens: ALONE, all_tokens: ALONE,
};

/** Ranks of a group. */
export function sizeOfGroup({ members }: Group): number {
  return members[0]!.length;
}

/** The place of every rank of a stage in its group: for `perRank`. */
export function placesIn({ members }: Group): number[] {
  const places: number[] = [];
  for (const ranks of members) {
    ranks.forEach((rank, place) => {
      places[rank] = place;
    });
  }
  return places;
}
