/**
 * The choice between kernels that compute the same. An op declares its candidates as a *tunable* and asks
 * `choose`, which answers at once: what was measured on this adapter, or else the default that is shipped for
 * it. Measuring is `tune` (tune.ts); it never changes the choices of an open device, so that a device's
 * results do not depend on when something was measured.
 */
import type { Gpu } from "../gpu/gpu.ts";

/**
 * The facts that a choice depends on; plain values, so that they can be written into a file and read back.
 */
export type Shape = Readonly<Record<string, number | string | boolean>>;

/** Elements of a result: real numbers are compared within the tolerance, whole ones exactly. */
export type TrialValues = Float32Array | Int32Array | Uint32Array;

/** A result of a trial; tensors are. */
export interface TrialOutput {
  read(): Promise<TrialValues>;
  release(): void;
}

/** Scratch tensors of one shape, on which every candidate can run. `trial` in tensor/trial.ts makes one. */
export interface Trial<C> {
  /** Records the launches of one candidate; the caller releases what it returns. */
  run(candidate: C): readonly TrialOutput[];
  dispose(): void;
}

export interface Tunable<D extends Gpu, S extends Shape, C extends string> {
  /** The op or kernel family that chooses, such as "matmul/product". */
  readonly name: string;
  /**
   * The shape that stands for all that are alike: sizes rounded with `bucket`, everything else that decides.
   * Shapes with equal results share one choice, and the result itself is what is measured.
   */
  classOf(shape: S): S;
  /** Every way that this device can run, at least one. */
  candidates(device: D, shape: S): readonly C[];
  /** The shipped default, one of the candidates. */
  fallback(device: D, shape: S): C;
  /** Scratch tensors for a shape that `classOf` returned. */
  trial(device: D, shape: S): Trial<C>;
  /** Largest difference to the default's result, relative to its largest entry, that is only rounding. */
  tolerance(shape: S): number;
}

/** A tunable whose types only its own op knows. */
export type AnyTunable = Tunable<Gpu, Shape, string>;

/** All tunables by name. */
export const tunables = new Map<string, AnyTunable>();

/** Enters a tunable into the list of all. */
export function defineTunable<D extends Gpu, S extends Shape, C extends string>(
  tunable: Tunable<D, S, C>,
): Tunable<D, S, C> {
  if (tunables.has(tunable.name)) throw new Error(`A tunable named ${tunable.name} is already registered.`);
  tunables.set(tunable.name, tunable as unknown as AnyTunable);
  return tunable;
}

/** The candidate for a shape on a device. Cheap and synchronous; the same for the device's whole life. */
export function choose<D extends Gpu, S extends Shape, C extends string>(
  device: D, tunable: Tunable<D, S, C>, shape: S,
): C {
  return choicesOf(device).choose(device, tunable, shape);
}

/** The next power of two, at most `most`: sizes in one bucket share a choice. */
export function bucket(size: number, most = 4096): number {
  return size <= 1 ? Math.max(0, size) : Math.min(most, 2 ** Math.ceil(Math.log2(size)));
}

/** The text of a class: `m=64 n=128 transA=false`, as it stands in tables and files. */
export function classText(shape: Shape): string {
  let text = "";
  for (const name in shape) text += `${text === "" ? "" : " "}${name}=${shape[name]}`;
  return text;
}

/** The shape that `classText` wrote; null for anything else. */
export function parseClass(text: string): Shape | null {
  const shape: Record<string, number | string | boolean> = {};
  for (const part of text === "" ? [] : text.split(" ")) {
    const [, name, value] = /^(\w+)=([\w.+-]+)$/.exec(part) ?? [];
    if (name === undefined || value === undefined || name === "__proto__") return null;
    const number = Number(value);
    shape[name] = value === "true" || value === "false" ? value === "true" : Number.isNaN(
      number) ? value : number;
  }
  return shape;
}

/** Where a choice came from: shipped, measured on this adapter, or prescribed by a checkpoint. */
export type ChoiceSource = "default" | "measured" | "pinned";

/** What a device has decided for one class. */
export interface UsedChoice {
  readonly tunable: string;
  readonly class: string;
  readonly choice: string;
  readonly source: ChoiceSource;
  /** Calls of `choose`; a captured step counts once. */
  count: number;
}

/** Choices by tunable and class: `{ "matmul/product": { "m=64 n=64": "quad" } }`. */
export type ChoiceTable = Readonly<Record<string, Readonly<Record<string, string>>>>;

/** The choices of one device. */
export class Choices {
  readonly #used = new Map<string, UsedChoice>();
  readonly #measured = new Map<string, string>();
  readonly #pinned = new Map<string, string>();

  choose<D extends Gpu, S extends Shape, C extends string>(
    device: D, tunable: Tunable<D, S, C>, shape: S): C {
    const representative = tunable.classOf(shape);
    const text = classText(representative);
    const key = `${tunable.name} ${text}`;
    const known = this.#used.get(key);
    if (known) {
      known.count++;
      return known.choice as C;
    }
    const candidates = tunable.candidates(device, representative);
    const find = (wanted: string | undefined) => candidates.find((candidate) => candidate === wanted);
    const pinned = find(this.#pinned.get(key));
    const measured = find(this.#measured.get(key));
    const choice = pinned ?? measured ?? tunable.fallback(device, representative);
    const source = pinned !== undefined ? "pinned" : measured !== undefined ? "measured" : "default";
    this.#used.set(key, { tunable: tunable.name, class: text, choice, source, count: 1 });
    return choice;
  }

  /** Takes what was measured; for a new device, before its first use. */
  load(table: ChoiceTable): void {
    for (const [key, choice] of entriesOf(table)) this.#measured.set(key, choice);
  }

  /**
   * Prescribes choices, as a resumed run does to compute what the run before it would have. They hold for
   * everything recorded from now on; those that this device cannot run are passed over.
   */
  pin(table: ChoiceTable): void {
    for (const [key, choice] of entriesOf(table)) {
      this.#pinned.set(key, choice);
      if (this.#used.get(key)?.choice !== choice) this.#used.delete(key);
    }
  }

  /** Every class decided so far, in the order of their first use. */
  get used(): readonly UsedChoice[] {
    return [...this.#used.values()];
  }

  /** What was decided so far, to be pinned elsewhere. */
  table(): ChoiceTable {
    const table: Record<string, Record<string, string>> = {};
    for (const { tunable, class: text, choice } of this.#used.values()) (table[tunable] ??= {})[text] =
      choice;
    return table;
  }

  /** Classes that run on their default for want of a measurement, the most used first. */
  wanted(): { tunable: string; class: string; count: number }[] {
    return this.used.filter(({ source }) => source === "default")
      .map(({ tunable, class: text, count }) => ({ tunable, class: text, count }))
      .sort((a, b) => b.count - a.count);
  }
}

/** What a table says; of one that was read from a file, whatever in it is a table. */
function entriesOf(table: ChoiceTable): [key: string, choice: string][] {
  return Object.entries(table ?? {}).flatMap(([tunable, classes]) =>
    Object.entries(classes ?? {}).map(([text, choice]): [string, string] => [`${tunable} ${text}`, choice]));
}

const choices = new WeakMap<Gpu, Choices>();

/** The choices of a device. */
export function choicesOf(device: Gpu): Choices {
  let own = choices.get(device);
  if (!own) {
    own = new Choices();
    choices.set(device, own);
  }
  return own;
}
