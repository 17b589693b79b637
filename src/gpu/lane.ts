/** Whose work is being recorded, and what passes between ranks: what a trace draws beside what. */
import type { BufferView } from "./gpu.ts";

export interface Lane {
  /** Ranks that the work belongs to; those that communicate, with the sender first. */
  readonly ranks: readonly number[];
  /** The op, or the collective and its group. */
  readonly what: string;
  readonly kind: "compute" | "communication";
  /** The pass of a micro-batch that it belongs to; empty outside of one. */
  readonly pass: string;
}

/** One collective of one group of ranks, or a message between two. */
export interface Traffic {
  readonly kind: string;
  /** The axes that the ranks differ in. */
  readonly group: string;
  readonly algorithm: string;
  /** In the order of the group; of a message the sender and who receives it. */
  readonly ranks: readonly number[];
  /** Bytes that each of them sends. */
  readonly sent: readonly number[];
  readonly backward: boolean;
  /** Where only the GPU knows how many rows there are: `sent` is then the most there can be. */
  readonly counted?: Counted;
}

export interface Counted {
  /** What each rank of the group has counted, u32. */
  readonly counts: readonly BufferView[];
  /** Bytes that each of them really sends, from the values of the counts. */
  sent(counts: readonly ArrayLike<number>[]): number[];
}

/** The stage and the pass whose work is recorded, and the rank of it that an op runs for. */
interface Place {
  readonly first: number;
  readonly pass: string;
  readonly rank: number;
}

let place: Place = { first: 0, pass: "", rank: 0 };
let lane: Lane | null = null;

/** What is recorded now; null: nobody's. */
export function currentLane(): Lane | null {
  return lane;
}

/** Runs `body` for a pipeline stage whose ranks begin at `first`. */
export function onStage<T>(first: number, pass: string, body: () => T): T {
  return at({ ...place, first, pass }, body);
}

/** Runs `body` for one rank of the stage. */
export function forRank<T>(rank: number, body: () => T): T {
  return at({ ...place, rank }, body);
}

/** Runs `body` as an op of the rank, unless it is part of another one. */
export function asOp<T>(what: string, body: () => T): T {
  return lane ? body() : asComputing(what, place.rank, body);
}

/** Runs `body` as computing of one rank of the stage, in the midst of communication too. */
export function asComputing<T>(what: string, rank: number, body: () => T): T {
  return onLane({ ranks: [place.first + rank], what, kind: "compute", pass: place.pass }, body);
}

/** Runs `body` as communication between ranks of the stage. */
export function asCommunication<T>(what: string, ranks: readonly number[], body: () => T): T {
  const all = ranks.map((rank) => place.first + rank);
  return onLane({ ranks: all, what, kind: "communication", pass: place.pass }, body);
}

/** Runs `body` as the backward pass of what was recorded on a lane. */
export function asBackward<T>(of: Lane | null, body: () => T): T {
  return onLane(of && { ...of, what: `${of.what} backward`, pass: place.pass }, body);
}

function at<T>(next: Place, body: () => T): T {
  const outer = place;
  place = next;
  try {
    return body();
  } finally {
    place = outer;
  }
}

/** Runs `body` as work of a lane. */
export function onLane<T>(next: Lane | null, body: () => T): T {
  const outer = lane;
  lane = next;
  try {
    return body();
  } finally {
    lane = outer;
  }
}
