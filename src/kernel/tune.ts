/** Measures the candidates of tunables within a budget of time. */
import type { Gpu } from "../gpu/gpu.ts";
import { median } from "../gpu/measure.ts";
import { type AnyTunable, choicesOf, parseClass, type Trial, type TrialValues, tunables } from "./tuner.ts";

/** What was found out about one class on one adapter. */
export interface Decision {
  readonly tunable: string;
  readonly class: string;
  /** Null where the default is all that could be measured. */
  readonly choice: string | null;
  readonly default: string;
  /** Median milliseconds of every candidate that was measured to the end. */
  readonly ms: Readonly<Record<string, number>>;
  /** Why the others were not, as clauses. */
  readonly rejected: Readonly<Record<string, string>>;
}

export interface TuneOptions<D extends Gpu> {
  /** Opens a device for measuring; again after a candidate has made one fail. Tuning destroys it. */
  readonly open: () => Promise<D>;
  readonly classes: readonly { tunable: string; class: string }[];
  /** Milliseconds for all classes together, compiling included; a kernel that is compiling is waited for. */
  readonly budgetMs?: number;
  /** What an earlier run decided; those classes are done, and what it rejected is not tried again. */
  readonly known?: readonly Decision[];
  /** Called with every decision as it is made. */
  readonly onDecision?: (decision: Decision) => void | Promise<void>;
  readonly onProgress?: (progress: { tunable: string; class: string; candidate: string; spentMs: number }) =>
    void;
  readonly signal?: AbortSignal;
}

export const DEFAULT_BUDGET_MS = 10_000;
/** A kernel that compiles longer than this would cost more than it saves. */
const COMPILE_LIMIT_MS = 6_000;
const ROUNDS = 5;
/**
 * One timing lasts at least this long, by repeating the launches: waiting for the GPU costs 0.1 ms itself.
 */
const MIN_TIMING_MS = 3;
const MAX_REPEATS = 64;
/** In the first round a candidate slower than the best by this factor is out. */
const HOPELESS = 2;
/** The default stays unless another is faster by more than this: the clock is not finer. */
const MARGIN = 0.97;

/** Measures classes in order until all are decided or the budget is spent; returns what was decided. */
export async function tune<D extends Gpu>(options: TuneOptions<D>): Promise<Decision[]> {
  const { classes, budgetMs = DEFAULT_BUDGET_MS, known = [], signal } = options;
  const start = performance.now();
  const spent = () => performance.now() - start;
  const over = () => spent() >= budgetMs || signal?.aborted === true;
  const decisions: Decision[] = [];
  let device: D | null = null;
  try {
    for (const wanted of classes) {
      const before = known.find((d) => d.tunable === wanted.tunable && d.class === wanted.class);
      if (before && before.choice !== null) continue;
      const tunable = tunables.get(wanted.tunable);
      const shape = parseClass(wanted.class);
      if (!tunable || !shape) continue;
      const measuring = { tunable, shape, text: wanted.class, rejected: { ...before?.rejected } };
      // A candidate may make the device fail; the others then get a new one.
      for (let isDone = false; !isDone && !over();) {
        if (device?.failure) device = discard(device);
        device ??= await options.open();
        const decision = await measureClass(device, measuring, over, (candidate) =>
          options.onProgress?.({ ...wanted, candidate, spentMs: spent() }));
        isDone = decision !== null;
        if (!decision) continue;
        decisions.push(decision);
        await options.onDecision?.(decision);
      }
      if (over()) break;
      await pause();
    }
  } finally {
    if (device) discard(device);
  }
  return decisions;
}

/** Keeps decisions; a `TunerCache` does. */
export interface DecisionKeeper {
  load(): Promise<readonly Decision[]>;
  save(decision: Decision): Promise<void>;
}

const POLL_MS = 250;

/**
 * Measures what a device in use misses, on devices of its own, until the budget is spent or the device is
 * closed. Whatever goes wrong ends it without a word: the defaults do.
 */
export async function tuneBeside<D extends Gpu>(
  device: D, open: () => Promise<D>, keeper: DecisionKeeper, budgetMs = DEFAULT_BUDGET_MS,
): Promise<void> {
  const closed = new AbortController();
  device.gpuDevice.lost.then(() => closed.abort(), () => closed.abort());
  const tried = new Set<string>();
  let left = budgetMs;
  try {
    while (left > 0 && !device.failure) {
      await pause(POLL_MS);
      const classes = choicesOf(device).wanted().filter((c) => !tried.has(`${c.tunable} ${c.class}`));
      if (classes.length === 0) continue;
      const start = performance.now();
      for (const c of classes) tried.add(`${c.tunable} ${c.class}`);
      await tune({
        open, classes, budgetMs: left, known: await keeper.load(), signal: closed.signal,
        onDecision: (decision) => keeper.save(decision),
      });
      left -= performance.now() - start;
    }
  } catch {
    // no device for measuring, or no place to keep the results
  }
}

interface Measuring {
  readonly tunable: AnyTunable;
  readonly shape: NonNullable<ReturnType<typeof parseClass>>;
  readonly text: string;
  /** Grows while candidates are tried. */
  readonly rejected: Record<string, string>;
}

/** Lets whatever else waits in this thread run; does not keep a process alive. */
function pause(ms = 0): Promise<void> {
  return new Promise((resolve) => {
    const timer: unknown = setTimeout(resolve, ms);
    if (ms > 0) (timer as { unref?: () => void }).unref?.();
  });
}

function discard(device: Gpu): null {
  device.destroy();
  return null;
}

/** Null when a candidate failed, which is then noted: each can do so once. */
async function measureClass(
  device: Gpu, { tunable, shape, text, rejected }: Measuring, over: () => boolean,
  progress: (candidate: string) => void,
): Promise<Decision | null> {
  const fallback = tunable.fallback(device, shape);
  const decision = (choice: string | null, ms: Record<string, number>): Decision =>
    ({ tunable: tunable.name, class: text, choice, default: fallback, ms, rejected: { ...rejected } });
  const candidates = [fallback, ...tunable.candidates(device, shape).filter((name) => name !== fallback)]
    .filter((name) => rejected[name] === undefined);
  if (candidates.length < 2 || candidates[0] !== fallback) return decision(fallback, {});
  let trial: Trial<string> | null = null;
  let running = fallback;
  try {
    trial = tunable.trial(device, shape);
    const expected = await results(device, trial, fallback);
    const contenders: string[] = [fallback];
    for (const candidate of candidates.slice(1)) {
      if (over()) return decision(null, {});
      running = candidate;
      progress(candidate);
      const start = performance.now();
      const found = await results(device, trial, candidate);
      const compiled = performance.now() - start;
      const error = difference(found, expected);
      const allowed = tunable.tolerance(shape);
      if (!(error <= allowed)) {
        rejected[candidate] = `differs by ${error.toExponential(1)}, allowed ${allowed.toExponential(1)}`;
      } else if (compiled > COMPILE_LIMIT_MS) {
        rejected[candidate] = `compiles for ${(compiled / 1000).toFixed(1)} s`;
      } else contenders.push(candidate);
    }
    const times = await race(device, trial, contenders, rejected, over, (candidate) => {
      running = candidate;
      progress(candidate);
    });
    if (times === null) return decision(null, {});
    const ms = Object.fromEntries([...times].map(
      ([name, values]) => [name, median(values.sort((a, b) => a - b))]));
    const best = Object.keys(ms).reduce((a, b) => (ms[b]! < ms[a]! ? b : a));
    return decision(ms[best]! < MARGIN * ms[fallback]! ? best : fallback, ms);
  } catch (error) {
    rejected[running] = `fails: ${(error instanceof Error ? error.message : String(error)).split("\n")[0]}`;
    return null;
  } finally {
    if (!device.failure) trial?.dispose();
  }
}

/** Rounds in which every contender runs once, the hopeless ones left out; null when time ran out. */
async function race(
  device: Gpu, trial: Trial<string>, contenders: readonly string[], rejected: Record<string, string>,
  over: () => boolean, progress: (candidate: string) => void,
): Promise<Map<string, number[]> | null> {
  const [fallback] = contenders;
  const once = await time(device, trial, fallback!, 1);
  const repeats = Math.max(1, Math.min(MAX_REPEATS, Math.ceil(MIN_TIMING_MS / Math.max(once, 0.01))));
  const times = new Map(contenders.map((name): [string, number[]] => [name, []]));
  for (let round = 0; round < ROUNDS; round++) {
    // In one round forth, in the next back, so that none always follows the same other.
    const order = round % 2 === 0 ? [...times.keys()] : [...times.keys()].reverse();
    for (const name of order) {
      if (over()) return round >= 2 ? times : null;
      progress(name);
      times.get(name)!.push(await time(device, trial, name, repeats));
      await pause();
    }
    if (round > 0) continue;
    const best = Math.min(...[...times.values()].map(([first]) => first!));
    for (const [name, [first]] of times) {
      if (name === fallback || first! <= HOPELESS * best) continue;
      // Once may have been bad luck, unless it is far off.
      const second = first! > 2 * HOPELESS * best ? first! : await time(device, trial, name, repeats);
      const factor = Math.min(first!, second) / best;
      if (factor <= HOPELESS) continue;
      rejected[name] = `${factor.toFixed(1)} times as slow`;
      times.delete(name);
    }
  }
  return times;
}

/** Milliseconds of one run. */
async function time(device: Gpu, trial: Trial<string>, candidate: string, repeats: number): Promise<number> {
  await device.finish();
  const start = performance.now();
  for (let i = 0; i < repeats; i++) for (const output of trial.run(candidate)) output.release();
  await device.finish();
  return (performance.now() - start) / repeats;
}

async function results(device: Gpu, trial: Trial<string>, candidate: string): Promise<TrialValues[]> {
  const outputs = trial.run(candidate);
  try {
    const values: TrialValues[] = [];
    for (const output of outputs) values.push(await output.read());
    return values;
  } finally {
    if (!device.failure) for (const output of outputs) output.release();
  }
}

/** The largest difference relative to the largest expected entry; infinite where integers or NaNs differ. */
function difference(found: readonly TrialValues[], expected: readonly TrialValues[]): number {
  let worst = 0;
  for (const [i, values] of expected.entries()) {
    const others = found[i];
    if (others?.length !== values.length) return Infinity;
    let largest = 1e-30;
    let error = 0;
    for (let j = 0; j < values.length; j++) {
      const [value, other] = [values[j]!, others[j]!];
      if (Number.isFinite(value)) largest = Math.max(largest, Math.abs(value));
      if (Object.is(value, other) || value === other) continue;
      const gap = Math.abs(value - other);
      if (!Number.isFinite(gap) || !(values instanceof Float32Array)) return Infinity;
      error = Math.max(error, gap);
    }
    worst = Math.max(worst, error / largest);
  }
  return worst;
}
