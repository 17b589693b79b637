/** What a training run computes a second time in the backward pass, instead of keeping it. */
import { UsageError } from "../tensor/errors.ts";

/**
 * Parts of layers: `core_attn` scores and their sums; `mamba` convolution, scan and gated norm, all between
 * the projections; `mlp`, `moe` and `shared_experts` whole. Of `layernorm` (the norm in front of a layer) and
 * `moe_act` (activations of routed experts, and the product that they are fused with) the results are given
 * back as well, until a gradient needs them.
 */
export const RECOMPUTED_MODULES = [
  "core_attn", "mamba", "mlp", "moe", "shared_experts", "moe_act", "layernorm",
] as const;
export type RecomputedModule = (typeof RECOMPUTED_MODULES)[number];

export interface Recompute {
  /** Layers that share one kept input; 0: layers run once. */
  readonly layers: number;
  /** Of a stage the first so many layers; the others run once. */
  readonly first: number;
  /** Parts of layers that are not recomputed whole. */
  readonly modules: ReadonlySet<RecomputedModule>;
}

export const RECOMPUTE_OFF: Recompute = { layers: 0, first: 0, modules: new Set() };

/**
 * "off"; "full" or "full:N", of every N layers the input of the first alone is kept; "block:N", of a stage's
 * first N layers the inputs; or modules, by commas.
 * @throws UsageError for anything else
 */
export function parseRecompute(text: string): Recompute {
  if (text === "off") return RECOMPUTE_OFF;
  if (text === "full") return { ...RECOMPUTE_OFF, layers: 1, first: Infinity };
  const [, kind, number] = /^(full|block):([1-9]\d*)$/.exec(text) ?? [];
  if (kind === "full") return { ...RECOMPUTE_OFF, layers: Number(number), first: Infinity };
  if (kind === "block") return { ...RECOMPUTE_OFF, layers: 1, first: Number(number) };
  const names = text.split(",").map((name) => name.trim());
  const modules = names.filter((name): name is RecomputedModule =>
    RECOMPUTED_MODULES.some((known) => known === name));
  if (modules.length === names.length) return { ...RECOMPUTE_OFF, modules: new Set(modules) };
  throw new UsageError(
    "What is recomputed must be off, full, full:N, block:N or modules among " +
    `${RECOMPUTED_MODULES.join(", ")} by commas, found "${text}".`);
}
