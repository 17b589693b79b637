/**
 * A training step on the clocks of its ranks. Ranks that share a device take turns; here every piece of work
 * was run and timed by itself, and is put where it would begin if each rank had its own device: after the
 * rank's work before it, and for communication after that of all ranks that take part. The log of collectives
 * is what was measured of them on the way.
 */
import type { BufferView } from "../gpu/gpu.ts";
import type { Lane, Traffic } from "../gpu/lane.ts";
import type { Stretch } from "../gpu/stream.ts";
import { coordinatesOf, worldOf } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";

/** A collective of one group, or a message. */
export interface SentCollective {
  readonly kind: string;
  /** The axes that its ranks differ in. */
  readonly group: string;
  readonly algorithm: string;
  /** In the order of the group; of a message the sender and who receives it. */
  readonly ranks: readonly number[];
  /** The pass that it belongs to: "forward 3", "backward 3", "update"; empty outside of one. */
  readonly pass: string;
  /** Whether it is what the gradients of another collective travel by. */
  readonly backward: boolean;
  /** Bytes that each of the ranks sends, and those of all of them. */
  readonly sent: readonly number[];
  readonly bytes: number;
  /** Bytes that there is room for, where only the GPU knows how many rows there are; else null. */
  readonly room: number | null;
}

/** One that ran: its bytes are those really sent. */
export interface TimedCollective extends SentCollective {
  /** Of all ranks together: on a shared device their copies, one after the other. */
  readonly milliseconds: number;
  /** Whose clock that is: see `Stretch`. */
  readonly clock: Stretch["clock"];
}

/** A collective as it is recorded: where only the GPU knows how many rows there are, the most of them. */
export function recordedCollective(traffic: Traffic, pass: string): SentCollective {
  const { kind, group, algorithm, ranks, backward, counted, sent } = traffic;
  const bytes = sumOf(sent);
  return { kind, group, algorithm, ranks, pass, backward, sent, bytes, room: counted ? bytes : null };
}

/** A piece of work on one rank's clock, milliseconds. */
export interface TraceEvent {
  readonly rank: number;
  readonly what: string;
  readonly kind: Lane["kind"];
  readonly pass: string;
  readonly start: number;
  readonly end: number;
  readonly clock: Stretch["clock"];
  /** What passed between ranks, where it begins here. */
  readonly collective: Collective | null;
  /** The kernels and copies of work of one rank, on the same clock, where the GPU has timestamps. */
  readonly kernels: readonly TracedKernel[];
}

export interface TracedKernel {
  readonly name: string;
  readonly workgroups: string;
  readonly start: number;
  readonly end: number;
}

type Drawn = Pick<TraceEvent, "rank" | "what" | "start" | "end">;

/** How a rank spends a step, milliseconds. */
export interface RankTime {
  readonly rank: number;
  readonly compute: number;
  readonly communication: number;
  /** Between its work, and until the last rank is done. */
  readonly idle: number;
}

/** Reads what memory holds at the moment, of whatever device. */
export type Peek = (view: BufferView) => Promise<ArrayBuffer>;

/** One run of a collective; devices that take part tell of it one by one. */
class Collective {
  readonly traffic: Traffic;
  readonly pass: string;
  readonly counts: ArrayLike<number>[] = [];
  milliseconds = 0;
  clock: Stretch["clock"] = "gpu";

  constructor(traffic: Traffic, pass: string) {
    this.traffic = traffic;
    this.pass = pass;
  }

  /** Bytes that each rank sent. */
  get sent(): readonly number[] {
    const { counted, sent } = this.traffic;
    return counted ? counted.sent(this.counts) : sent;
  }

  timed(): TimedCollective {
    const { sent, traffic, pass, milliseconds, clock } = this;
    return { ...recordedCollective(traffic, pass), sent, bytes: sumOf(sent), milliseconds, clock };
  }
}

/** What the stream of one device is at. */
interface Reporter {
  /** The last collective on every lane: other work may come between its pieces. */
  readonly on: Map<Lane, Collective>;
  /** How often each collective has run there. */
  readonly runs: Map<Traffic, number>;
}

export class StepTrace {
  readonly events: TraceEvent[] = [];
  readonly #clocks: number[];
  readonly #collectives = new Map<Traffic, Collective[]>();
  readonly #inOrder: Collective[] = [];

  constructor(ranks: number) {
    this.#clocks = Array<number>(ranks).fill(0);
  }

  /**
   * Takes what the stream of a device does, piece by piece.
   * @param isHere whether memory lies on the device
   */
  reporter(
    isHere: (view: BufferView) => boolean = () => true,
    peek: Peek = () => Promise.reject(new Error("Counts on a GPU need a device that reads them.")),
  ): (stretch: Stretch) => Promise<void> {
    const { on, runs }: Reporter = { on: new Map(), runs: new Map() };
    return async (stretch) => {
      const { lane, traffic } = stretch;
      const begun = traffic && this.#begin(traffic, lane?.pass ?? "", runs);
      if (begun && lane) on.set(lane, begun);
      const current = begun ?? (lane && on.get(lane)) ?? null;
      this.#draw(stretch, current);
      if (!current) return;
      current.milliseconds += stretch.milliseconds;
      if (stretch.clock === "host") current.clock = "host";
      if (!traffic?.counted) return;
      for (const [rank, counts] of traffic.counted.counts.entries()) {
        if (isHere(counts)) current.counts[rank] = new Uint32Array(await peek(counts));
      }
    };
  }

  #begin(traffic: Traffic, pass: string, runs: Map<Traffic, number>): Collective {
    const number = runs.get(traffic) ?? 0;
    runs.set(traffic, number + 1);
    const all = this.#collectives.get(traffic) ?? [];
    this.#collectives.set(traffic, all);
    const known = all[number];
    if (known) return known;
    const collective = all[number] = new Collective(traffic, pass);
    this.#inOrder.push(collective);
    return collective;
  }

  /** What belongs to no rank is left out, unless there is only one. */
  #draw({ lane, traffic, milliseconds, clock, kernels }: Stretch, current: Collective | null): void {
    const isOne = this.#clocks.length === 1;
    const owner = lane ??
      (isOne ? { ranks: [0], what: "between ops", kind: "compute", pass: "" } as const : null);
    if (!owner) return;
    const { ranks, kind, pass } = owner;
    const what = current ? `${current.traffic.kind} over ${current.traffic.group}` : owner.what;
    // A message waits for its sender alone.
    const waits = ranks.filter((_, i) => current?.traffic.kind !== "send" || current.traffic.sent[i]! > 0);
    const start = Math.max(...waits.map((rank) => this.#clocks[rank]!));
    const zero = Math.min(...kernels.map(({ startUs }) => startUs));
    for (const [i, rank] of ranks.entries()) {
      const from = Math.max(start, this.#clocks[rank]!);
      const end = Math.max(start + milliseconds, from);
      this.events.push({
        rank, what, kind, pass, start: from, end, clock, collective: traffic && current,
        kernels: i > 0 ? [] : kernels.map(({ name, workgroups, startUs, durationUs }) => {
          const at = start + (startUs - zero) / 1000;
          return { name, workgroups: workgroups.join(" x "), start: at, end: at + durationUs / 1000 };
        }),
      });
      this.#clocks[rank] = end;
    }
  }

  /** What passed between ranks, in the order in which it began. */
  get collectives(): TimedCollective[] {
    return this.#inOrder.map((collective) => collective.timed());
  }

  /** Milliseconds until the last rank is done. */
  get length(): number {
    return Math.max(...this.#clocks);
  }

  get times(): RankTime[] {
    return this.#clocks.map((_, rank) => {
      const own = this.events.filter((event) => event.rank === rank);
      const sum = (of: Lane["kind"]) => own.reduce(
        (total, { kind, start, end }) => total + (kind === of ? end - start : 0), 0);
      const [compute, communication] = [sum("compute"), sum("communication")];
      return { rank, compute, communication, idle: this.length - compute - communication };
    });
  }

  /**
   * The trace as Chrome and Perfetto read it: a lane per rank, passes around their ops, these around their
   * kernels. Collectives tell their group and bytes.
   */
  chromeTrace(mesh: MeshModel): string {
    const sizes = mesh.layout;
    const names = Array.from({ length: worldOf(sizes) }, (_, rank) => {
      const { tp, cp, dp, pp } = coordinatesOf(sizes, rank);
      return {
        name: "thread_name", ph: "M", pid: 1, tid: rank,
        args: { name: `rank ${rank} (tp ${tp}, cp ${cp}, dp ${dp}, pp ${pp})` },
      };
    });
    const slice = (
      { rank, what, start, end }: Drawn, cat: string, args?: object,
    ) => ({
      name: what, cat, ph: "X", pid: 1, tid: rank, ts: 1000 * start, dur: 1000 * (end - start),
      ...(args ? { args } : {}),
    });
    const passes = passesOf(this.events).map((event) => slice(event, "pass"));
    const work = this.events.flatMap((event) => [
      slice(event, event.kind, argumentsOf(event)),
      ...event.kernels.map(({ name, workgroups, start, end }) =>
        slice({ rank: event.rank, what: name, start, end }, "kernel", { workgroups })),
    ]);
    const waits = gapsOf(this.events, this.length, this.#clocks.length).map((event) => slice(event, "wait"));
    return JSON.stringify({ displayTimeUnit: "ms", traceEvents: [...names, ...passes, ...work, ...waits] });
  }
}

/** What a slice of the trace tells beside its name and time. */
function argumentsOf({ rank, clock, collective }: TraceEvent): object {
  if (!collective) return { clock };
  const { sent, traffic: { group, ranks, algorithm } } = collective;
  return {
    clock, group, ranks: ranks.join(" "), algorithm, bytes_sent: sent[ranks.indexOf(rank)],
    bytes: sumOf(sent),
  };
}

/** Collectives of one kind in one kind of group, in a step. */
export interface CollectiveSum {
  readonly kind: string;
  readonly group: string;
  /** Collectives of all such groups together. */
  readonly calls: number;
  /** Bytes that all ranks send, and the rank that sends most. */
  readonly bytes: number;
  readonly bytes_per_rank: number;
  /** Whether these are the most there can be, since nobody read what was counted. */
  readonly at_most: boolean;
  /** Of all of them, one after the other; null where nothing was timed. */
  readonly milliseconds: number | null;
}

/** Adds up collectives by kind and group, in the order in which they first come. */
export function sumCollectives(all: readonly (SentCollective | TimedCollective)[]): CollectiveSum[] {
  const sums = new Map<string, CollectiveSum & { readonly byRank: Map<number, number> }>();
  for (const one of all) {
    const { kind, group, ranks, sent } = one;
    const key = `${kind} ${group}`;
    const before = sums.get(key);
    const byRank = before?.byRank ?? new Map<number, number>();
    ranks.forEach((rank, i) => byRank.set(rank, (byRank.get(rank) ?? 0) + sent[i]!));
    const milliseconds = "milliseconds" in one ? (before?.milliseconds ?? 0) + one.milliseconds : null;
    sums.set(key, {
      kind, group, calls: (before?.calls ?? 0) + 1, bytes: (before?.bytes ?? 0) + sumOf(sent), byRank,
      bytes_per_rank: Math.max(...byRank.values()), milliseconds,
      at_most: (before?.at_most ?? false) || (one.room !== null && milliseconds === null),
    });
  }
  return [...sums.values()].map(({ kind, group, calls, bytes, bytes_per_rank, at_most, milliseconds }) =>
    ({ kind, group, calls, bytes, bytes_per_rank, at_most, milliseconds }));
}

/** The collectives of a step as a log: one JSON object per line. */
export function collectiveLog(step: number, all: readonly TimedCollective[]): string {
  return all.map((one) => `${JSON.stringify({ step, ...one })}\n`).join("");
}

const sumOf = (values: readonly number[]): number => values.reduce((sum, one) => sum + one, 0);

/** From the first to the last piece of every pass of every rank, of passes in pairs where they take turns. */
function passesOf(events: readonly TraceEvent[]): Drawn[] {
  const last = new Map<number, { what: string; rank: number; start: number; end: number }>();
  return events.flatMap(({ rank, pass, start, end }) => {
    const before = last.get(rank);
    if (pass === "") return [];
    if (before?.what === pass) {
      before.end = end;
      return [];
    }
    const begun = { rank, what: pass, start, end };
    last.set(rank, begun);
    return [begun];
  });
}

/** When ranks wait. */
function gapsOf(events: readonly TraceEvent[], length: number, ranks: number): Drawn[] {
  return Array.from({ length: ranks }, (_, rank) => {
    const gaps: Drawn[] = [];
    let end = 0;
    const gap = (start: number) => {
      if (start > end) gaps.push({ rank, what: "wait", start: end, end: start });
    };
    for (const event of events) {
      if (event.rank !== rank) continue;
      gap(event.start);
      end = event.end;
    }
    gap(length);
    return gaps;
  }).flat();
}
