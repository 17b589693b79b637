/**
 * What the bench says to the process of a peer, one line each, and what that answers; and the arithmetic of
 * a result line. A request is a word and its arguments; a reply is one JSON object on file descriptor 3.
 */

/** Everything a peer can be asked. `run` applies the case's op n times, each to the result before it. */
export type Request =
  | { readonly verb: "prepare"; readonly name: string }
  | { readonly verb: "run"; readonly n: number }
  | { readonly verb: "sample"; readonly indices: readonly number[] }
  | { readonly verb: "quit" };

/** `numbers`: milliseconds per application for `run`, elements of one application's result for `sample`. */
export type Reply =
  | { readonly ok: true; readonly numbers: readonly number[]; readonly note: string }
  | { readonly ok: false; readonly error: string };

export function formatRequest(request: Request): string {
  switch (request.verb) {
    case "prepare": return `prepare ${request.name}\n`;
    case "run": return `run ${request.n}\n`;
    case "sample": return `sample ${request.indices.join(",")}\n`;
    case "quit": return "quit\n";
  }
}

/** Reads one request line. Throws Error for anything else, naming the line. */
export function parseRequest(line: string): Request {
  const [, verb, rest = ""] = /^(\S+)(?: (\S+))?$/.exec(line.trim()) ?? [];
  if (verb === "prepare" && rest !== "") return { verb, name: rest };
  if (verb === "run" && /^[1-9]\d*$/.test(rest)) return { verb, n: Number(rest) };
  if (verb === "sample" && /^\d+(,\d+)*$/.test(rest)) return { verb, indices: rest.split(",").map(Number) };
  if (verb === "quit" && rest === "") return { verb };
  throw new Error(`The request must be prepare, run, sample or quit with its argument, found "${line}".`);
}

/** Reads one reply line. Throws Error for what is no reply, naming the line. */
export function parseReply(line: string): Reply {
  let value: unknown = null;
  try {
    value = JSON.parse(line);
  } catch {
    // The sentence below says it.
  }
  const { ok, error, numbers, note } = (value ?? {}) as Record<string, unknown>;
  if (ok === false && typeof error === "string") return { ok, error };
  if (ok === true && typeof note === "string" && Array.isArray(numbers)) {
    // JSON has no NaN: a peer's NaN arrives as null and must stay wrong.
    return { ok, note, numbers: numbers.map((x) => (typeof x === "number" ? x : NaN)) };
  }
  throw new Error(`The peer's reply must be a JSON object with "ok", found "${line.slice(0, 200)}".`);
}

/** Splits a byte stream into whole lines; what follows the last line break waits for the next call. */
export function lineSplitter(onLine: (line: string) => void): (text: string) => void {
  let rest = "";
  return (text) => {
    const lines = (rest + text).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) if (line !== "") onLine(line);
  };
}

export interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** Median, smallest and largest of at least one number. */
export function spread(times: readonly number[]): Spread {
  const sorted = times.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle]!;
  return {
    median: sorted.length % 2 ? upper : (sorted[middle - 1]! + upper) / 2,
    min: sorted[0]!,
    max: sorted.at(-1)!,
  };
}

/**
 * max |found - expected| / max |expected|, both less `base` where it is given; NaN where any element found is
 * no number.
 */
export function relativeError(
  found: readonly number[], expected: readonly number[], base?: readonly number[],
): number {
  if (found.length !== expected.length) return NaN;
  let [error, size] = [0, 0];
  for (const [i, x] of expected.entries()) {
    error = Math.max(error, Math.abs(found[i]! - x)); // Math.max keeps NaN
    size = Math.max(size, Math.abs(x - (base?.[i] ?? 0)));
  }
  return error / size;
}

const LONG_LINK_MS = 1000;

/**
 * Milliseconds per link from the times of a chain of one link and of a longer one, which leaves out what
 * every run costs. `time` measures a chain of so many links. Throws Error when the longer one is never
 * slower.
 */
export async function slope(n: number, time: (links: number) => Promise<number>): Promise<number> {
  let more = n;
  for (let attempt = 0; attempt < 3; attempt++) {
    const one = await time(1);
    more = one > LONG_LINK_MS ? n : Math.max(3, n); // fewer short ones drown in the noise of the difference
    const difference = await time(more + 1) - one;
    if (difference > 0) return difference / more;
  }
  throw new Error(`A chain of ${more + 1} links never took longer than one link.`);
}

/**
 * How often a round repeats an op of `ms` so that it lasts about `target` milliseconds; `least` to `most`.
 */
export function repetitions(ms: number, target: number, most: number, least = 1): number {
  return Math.min(most, Math.max(least, Math.round(target / Math.max(ms, 1e-3))));
}

const round = (x: number, digits: number) => Number(x.toPrecision(digits));

/** The measured fields of a result line. ratio > 1: the peer takes longer. */
export function comparison(ours: readonly number[], theirs: readonly number[]) {
  const [a, b] = [spread(ours), spread(theirs)];
  return {
    ms: round(a.median, 4), min_ms: round(a.min, 4), max_ms: round(a.max, 4),
    peer_ms: round(b.median, 4), peer_min_ms: round(b.min, 4), peer_max_ms: round(b.max, 4),
    ratio: round(b.median / a.median, 3), runs: ours.length,
  };
}

/** One case of the peers suite, ours beside one other engine's. */
export interface PeerResult {
  readonly case: string;
  readonly adapter: string;
  readonly adapter_name: string;
  readonly peer: string;
  /** Median milliseconds of one application, and the spread. */
  readonly ms: number;
  readonly min_ms: number;
  readonly max_ms: number;
  readonly peer_ms: number;
  readonly peer_min_ms: number;
  readonly peer_max_ms: number;
  /** peer_ms / ms. */
  readonly ratio: number;
  readonly runs: number;
  /** Largest error of the sampled elements over the largest of them; null for no number. */
  readonly rel_err: number | null;
  readonly peer_rel_err: number | null;
  /** Largest error of a right answer; `ok` and `peer_ok`: whether the answers are. */
  readonly bound: number;
  readonly ok: boolean;
  readonly peer_ok: boolean;
  /** "gpu": on the adapter that Krait used. */
  readonly peer_kind: "gpu" | "cpu";
  readonly krait_op: string;
  readonly peer_op: string;
  readonly krait_version: string;
  readonly peer_version: string;
  /** Of Krait's sources; null where they are no clone, and with a plus sign where they were changed. */
  readonly commit: string | null;
}

/** What a case's lines come to: Krait beside the fastest peer on the same adapter whose answer was right. */
export interface Summary {
  readonly case: string;
  readonly peer: string;
  readonly ratio: number;
}

/** One line a case, in order; none for a case in which no peer on the adapter answered right. */
export function summarise(
  results: readonly Pick<PeerResult, "case" | "peer" | "ratio" | "peer_ok" | "peer_kind">[],
): Summary[] {
  const best = new Map<string, Summary>();
  for (const { case: name, peer, ratio, peer_ok, peer_kind } of results) {
    if (!peer_ok || peer_kind !== "gpu") continue;
    if (ratio < (best.get(name)?.ratio ?? Infinity)) best.set(name, { case: name, peer, ratio });
  }
  return [...best.values()];
}
