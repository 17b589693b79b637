/**
 * A training step on the clocks of its ranks. Ranks that share a device take turns; here every piece of work
 * was run and timed by itself, and is put where it would begin if each rank had its own device: after the
 * rank's work before it, and for communication after that of all ranks that take part.
 */
import type { Lane } from "../gpu/lane.ts";
import { coordinatesOf, worldOf } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";

/** A piece of work on one rank's clock, milliseconds. */
export interface TraceEvent {
  readonly rank: number;
  readonly what: string;
  readonly kind: Lane["kind"];
  readonly pass: string;
  readonly start: number;
  readonly end: number;
}

/** How a rank spends a step, milliseconds. */
export interface RankTime {
  readonly rank: number;
  readonly compute: number;
  readonly communication: number;
  /** Between its work, and until the last rank is done. */
  readonly idle: number;
}

export class StepTrace {
  readonly events: TraceEvent[] = [];
  readonly #clocks: number[];

  constructor(ranks: number) {
    this.#clocks = Array<number>(ranks).fill(0);
  }

  /** Takes the next piece of work; what belongs to no rank is left out. */
  add(lane: Lane | null, milliseconds: number): void {
    if (!lane) return;
    const { ranks, what, kind, pass } = lane;
    // What is sent along a pipeline waits for its sender alone.
    const waits = what === "pp" || what === "pp backward" ? ranks.slice(0, 1) : ranks;
    const start = Math.max(...waits.map((rank) => this.#clocks[rank]!));
    for (const rank of ranks) {
      const from = Math.max(start, this.#clocks[rank]!);
      const end = Math.max(start + milliseconds, from);
      this.events.push({ rank, what, kind, pass, start: from, end });
      this.#clocks[rank] = end;
    }
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

  /** The trace as Chrome and Perfetto read it: a lane per rank, passes around their ops. */
  chromeTrace(mesh: MeshModel): string {
    const sizes = mesh.layout;
    const names = Array.from({ length: worldOf(sizes) }, (_, rank) => {
      const { tp, cp, dp, pp } = coordinatesOf(sizes, rank);
      return {
        name: "thread_name", ph: "M", pid: 1, tid: rank,
        args: { name: `rank ${rank} (tp ${tp}, cp ${cp}, dp ${dp}, pp ${pp})` },
      };
    });
    const slice = ({ rank, what, start, end }: TraceEvent, cat: string) => ({
      name: what, cat, ph: "X", pid: 1, tid: rank, ts: 1000 * start, dur: 1000 * (end - start),
    });
    const passes = passesOf(this.events).map((event) => slice(event, "pass"));
    const work = this.events.map((event) => slice(event, event.kind));
    const waits = gapsOf(this.events, this.length, this.#clocks.length).map((event) => slice(event, "wait"));
    return JSON.stringify({ traceEvents: [...names, ...passes, ...work, ...waits] });
  }
}

/** From the first to the last piece of every pass of every rank. */
function passesOf(events: readonly TraceEvent[]): TraceEvent[] {
  const passes = new Map<string, TraceEvent>();
  for (const event of events) {
    const key = `${event.rank} ${event.pass}`;
    if (event.pass === "") continue;
    const before = passes.get(key);
    passes.set(key, { ...event, what: event.pass, start: before?.start ?? event.start });
  }
  return [...passes.values()];
}

/** When ranks wait. */
function gapsOf(events: readonly TraceEvent[], length: number, ranks: number): TraceEvent[] {
  return Array.from({ length: ranks }, (_, rank) => {
    const gaps: TraceEvent[] = [];
    let end = 0;
    const gap = (start: number) => {
      if (start > end) gaps.push({ rank, what: "wait", kind: "compute", pass: "", start: end, end: start });
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
