/** Reads the keys of a model configuration: aliases, defaults, ranges, one clear sentence on error. */
import { ConfigError } from "../tensor/errors.ts";

/** Largest width or count: a product of two is still an exact double. */
export const MAX_SIZE = 2 ** 26;

/** How a value looks in a message: JSON, cut after 60 characters. */
export function show(value: unknown): string {
  const text = typeof value === "number" ? String(value) : (JSON.stringify(value) ?? String(value));
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
}

/** Other spellings of keys, in releases and in the native classes of other programs. */
export const ALIASES: Readonly<Record<string, readonly string[]>> = {
  head_dim: ["attention_head_dim"],
  n_groups: ["mamba_n_groups"],
  conv_kernel: ["mamba_d_conv"],
  chunk_size: ["mamba_chunk_size"],
  use_conv_bias: ["mamba_conv_bias"],
  time_step_min: ["mamba_dt_min"],
  time_step_max: ["mamba_dt_max"],
  time_step_floor: ["mamba_dt_floor", "mamba_dt_init_floor"],
  time_step_limit: ["mamba_dt_limit"],
  layer_norm_epsilon: ["norm_eps", "rms_norm_eps"],
  layers_block_type: ["layer_types"],
  n_routed_experts: ["num_local_experts"],
  torch_dtype: ["dtype"],
};

/** A copy of a JSON object; undefined for anything else. */
export function asObject(value: unknown): Readonly<Record<string, unknown>> | undefined {
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  return isObject ? { ...value } : undefined;
}

export class ConfigKeys {
  /** Name of the file or preset, for messages. */
  readonly what: string;
  private readonly values: Readonly<Record<string, unknown>>;

  constructor(what: string, values: Readonly<Record<string, unknown>>) {
    this.what = what;
    this.values = values;
  }

  /** Throws ConfigError: what, key, expected, found. */
  fail(key: string, expected: string, found: unknown): never {
    throw new ConfigError(`${this.what}: ${key}: expected ${expected}, found ${show(found)}`);
  }

  /** The value under a key or an alias; undefined when all are absent or null. Two spellings must agree. */
  get(key: string): unknown {
    let name: string | undefined;
    let value: unknown;
    for (const spelling of [key, ...(ALIASES[key] ?? [])]) {
      if (!Object.hasOwn(this.values, spelling)) continue;
      const candidate = this.values[spelling];
      if (candidate === null || candidate === undefined) continue;
      if (name !== undefined && JSON.stringify(candidate) !== JSON.stringify(value)) {
        this.fail(spelling, `the same as ${name} (${show(value)})`, candidate);
      }
      name ??= spelling;
      value = candidate;
    }
    return value;
  }

  /** True when the key itself is there and null. */
  isNull(key: string): boolean {
    return Object.hasOwn(this.values, key) && this.values[key] === null;
  }

  has(key: string): boolean {
    return this.get(key) !== undefined;
  }

  integer(key: string, fallback: number, min = 1, max = MAX_SIZE): number {
    return this.checkInteger(key, this.get(key) ?? fallback, min, max);
  }

  integerOrNull(key: string, min = 1, max = MAX_SIZE): number | null {
    const value = this.get(key);
    return value === undefined ? null : this.checkInteger(key, value, min, max);
  }

  checkInteger(key: string, value: unknown, min: number, max: number): number {
    if (typeof value !== "number" || !Number.isSafeInteger(value) || value < min || value > max) {
      return this.fail(key, `an integer from ${min} to ${max}`, value);
    }
    return value;
  }

  /** A finite number, at least `min`; above it when `open`. */
  number(key: string, fallback: number, min: number, open = false): number {
    const value = this.get(key) ?? fallback;
    if (typeof value !== "number" || !Number.isFinite(value) || value < min || (open && value === min)) {
      return this.fail(key, `a number ${open ? "above" : "from"} ${min}`, value);
    }
    return value;
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.get(key) ?? fallback;
    return typeof value === "boolean" ? value : this.fail(key, "true or false", value);
  }

  /** One of a few texts. */
  choice<T extends string>(key: string, fallback: T, choices: readonly T[]): T {
    const value = this.get(key) ?? fallback;
    const found = choices.find((choice) => choice === value);
    if (found !== undefined) return found;
    return this.fail(key, choices.length === 1 ? show(choices[0]) : `one of ${choices.join(", ")}`, value);
  }

  list(key: string): readonly unknown[] | undefined {
    const value = this.get(key);
    if (value === undefined || Array.isArray(value)) return value;
    return this.fail(key, "a list", value);
  }

  /** Fails unless `divisor` divides `value`. */
  divides(divisorKey: string, divisor: number, key: string, value: number): void {
    if (value % divisor !== 0) this.fail(key, `a multiple of ${divisorKey} (${divisor})`, value);
  }
}
