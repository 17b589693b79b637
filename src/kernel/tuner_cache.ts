/** What was measured on an adapter, kept between runs: its text, whom it belongs to, where it lies. */
import type { Gpu } from "../gpu/gpu.ts";
import { codeHash, shaderNames, shaderSource } from "#shaders";
import { tunerStore, type TunerStore } from "#tuner-store";
import type { Decision } from "./tune.ts";
import { type ChoiceTable, parseClass, tunables } from "./tuner.ts";

const FORMAT = "krait-tuning-1";

/** Measurements hold for one adapter, driver, set of features and build of the kernels. */
export interface TunerIdentity {
  readonly adapter: string;
  readonly driver: string;
  /** Optional features that the device was opened with, and its workgroup memory. */
  readonly features: string;
  readonly build: string;
}

interface CacheText extends TunerIdentity {
  readonly format: typeof FORMAT;
  readonly decisions: readonly Decision[];
}

/** The measurements of one device's kind, in the user's cache or in another store. */
export class TunerCache {
  readonly #name: string;
  readonly #store: TunerStore;
  readonly #about: Omit<TunerIdentity, "build">;

  constructor(device: Gpu, store: TunerStore = tunerStore) {
    const { info, gpuDevice } = device;
    const { maxComputeWorkgroupStorageSize: memory, maxComputeInvocationsPerWorkgroup: size } =
      gpuDevice.limits;
    this.#about = {
      adapter: `${info.vendor} ${info.architecture} ${info.name}`, driver: info.description,
      features: `${[...gpuDevice.features].sort().join()} ${memory} ${size}`,
    };
    this.#name = `${info.id}-${hash(Object.values(this.#about).join("|"))}`;
    this.#store = store;
  }

  /** Whom the measurements belong to. */
  get identity(): TunerIdentity {
    return { ...this.#about, build: buildHash() };
  }

  /** Where the measurements lie, for a person to read. */
  get place(): string {
    return this.#store.place(this.#name);
  }

  /** Everything decided so far; nothing where the text is missing, damaged, or of another driver or build. */
  async load(): Promise<Decision[]> {
    try {
      const text = await this.#store.read(this.#name);
      return text === null ? [] : decodeCache(text, this.identity);
    } catch {
      return []; // no place to keep anything: the defaults do
    }
  }

  /** Adds a decision to what lies there by now, which another process may have written. */
  async save(decision: Decision): Promise<void> {
    const others = (await this.load())
      .filter((d) => d.tunable !== decision.tunable || d.class !== decision.class);
    await this.#store.write(this.#name, encodeCache([...others, decision], this.identity));
  }

  async clear(): Promise<void> {
    await this.#store.remove(this.#name);
  }
}

export function encodeCache(decisions: readonly Decision[], identity: TunerIdentity): string {
  const sorted = [...decisions].sort((a, b) =>
    `${a.tunable} ${a.class}` < `${b.tunable} ${b.class}` ? -1 : 1);
  const cache: CacheText = { format: FORMAT, ...identity, decisions: sorted };
  return `${JSON.stringify(cache, null, 1)}\n`;
}

/** Reads a cache text; an empty list unless all of it is what `encodeCache` writes for this identity. */
export function decodeCache(text: string, identity: TunerIdentity): Decision[] {
  let cache: Partial<CacheText> | null;
  try {
    cache = JSON.parse(text) as Partial<CacheText> | null;
  } catch {
    return [];
  }
  if (cache?.format !== FORMAT || !Array.isArray(cache.decisions)) return [];
  for (const key of ["adapter", "driver", "features", "build"] as const) {
    if (cache[key] !== identity[key]) return [];
  }
  return (cache.decisions as unknown[]).filter(isDecision);
}

/** The choices among decisions. */
export function choiceTable(decisions: readonly Decision[]): ChoiceTable {
  const table: Record<string, Record<string, string>> = {};
  for (const { tunable, class: text, choice } of decisions) {
    if (choice !== null) (table[tunable] ??= {})[text] = choice;
  }
  return table;
}

function isDecision(value: unknown): value is Decision {
  if (typeof value !== "object" || value === null) return false;
  const { tunable, class: text, choice, default: fallback, ms, rejected } = value as Record<string, unknown>;
  const holds = (record: unknown, type: string) =>
    typeof record === "object" && record !== null && Object.values(record).every(
      (entry) => typeof entry === type);
  return typeof tunable === "string" && tunables.has(tunable) && typeof text === "string" &&
    parseClass(text) !== null && (choice === null || typeof choice === "string") &&
      typeof fallback === "string" &&
    holds(ms, "number") && holds(rejected, "string");
}

let build: string | undefined;

/** A hash of every shader and of the ops: what changed in a kernel or around it must be measured anew. */
function buildHash(): string {
  build ??= hash([codeHash(), ...shaderNames().map((name) => `${name}\n${shaderSource(name)}`)].join("\n"));
  return build;
}

/** FNV-1a in two halves with different starts, 16 hexadecimal digits. */
function hash(text: string): string {
  let [a, b] = [0x811c9dc5, 0x050c5d1f];
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    a = Math.imul(a ^ code, 0x01000193);
    b = Math.imul(b ^ code, 0x01000193) ^ (b >>> 15);
  }
  return [a, b].map((half) => (half >>> 0).toString(16).padStart(8, "0")).join("");
}
