/** Which weights of a model are quantised, and which of them together. */
import {
  type CheckpointTensor, listCheckpointTensors, type ParameterKind,
} from "../models/checkpoint_names.ts";
import { layerSpecs, type NemotronHConfig } from "../models/config.ts";
import { UsageError } from "../tensor/errors.ts";
import { BLOCK, type TargetFormat } from "./encode.ts";

/** A linear layer, or the table of tokens: its checkpoint name without `.weight`. */
export interface Module {
  readonly name: string;
  readonly tensor: CheckpointTensor;
}

/** Kinds of parameters that products read, and tables of tokens: those that can be quantised. */
const KINDS: ReadonlySet<ParameterKind> = new Set([
  "embedding", "head", "expert", "mamba_linear", "attention_linear", "mlp_linear", "shared_linear",
  "latent_linear", "mtp_linear",
]);

/**
 * What the published releases keep in high precision: the table of tokens and the head, attention and the
 * Mamba layers that feed it, latent projections, the prediction block. Routers, convolutions and norms are
 * never quantised.
 */
export function defaultExclusions(config: NemotronHConfig): string[] {
  const specs = layerSpecs(config);
  const feeding = specs.flatMap(({ kind }, i) =>
    kind === "mamba" && specs[i + 1]?.kind === "attention" ? [`backbone.layers.${i}.mixer.*_proj`] : []);
  return [
    "lm_head", "backbone.embeddings", "*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", ...feeding,
    "*_latent_proj", "mtp*",
  ];
}

/** Whether a module's name matches a pattern as a whole: `*` any text, `?` one character. */
export function matches(pattern: string, name: string): boolean {
  const source = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".");
  return new RegExp(`^${source}$`).test(name);
}

export interface Selection {
  readonly chosen: readonly Module[];
  /** Names of the other modules that could have been quantised, and of routers and convolutions. */
  readonly excluded: readonly string[];
  /** Patterns that match no module. */
  readonly unmatched: readonly string[];
}

/**
 * The modules that are quantised.
 * @throws UsageError when none is left
 */
export function selectModules(config: NemotronHConfig, exclude: readonly string[]): Selection {
  const chosen: Module[] = [];
  const excluded: string[] = [];
  const matched = new Set<string>();
  for (const tensor of listCheckpointTensors(config)) {
    const { kind } = tensor.parameter;
    if (!KINDS.has(kind) && kind !== "router" && kind !== "conv") continue;
    const name = tensor.name.replace(/\.weight$/, "");
    const by = exclude.filter((pattern) => matches(pattern, name));
    for (const pattern of by) matched.add(pattern);
    if (by.length > 0 || !KINDS.has(kind)) excluded.push(name);
    else chosen.push({ name, tensor });
  }
  if (chosen.length === 0) {
    throw new UsageError(
      `Every matrix of the model is excluded by ${exclude.join(", ")}: expected one that is left to ` +
      "quantise.");
  }
  return { chosen, excluded, unmatched: exclude.filter((pattern) => !matched.has(pattern)) };
}

/** Whether a weight's rows are whole blocks of a format. */
export function fits(module: Module, format: TargetFormat): boolean {
  return module.tensor.shape.at(-1)! % BLOCK[format] === 0;
}

/**
 * Modules that share a format: queries, keys and values of a layer; all experts of a layer; all others alone.
 */
export function groupModules(modules: readonly Module[]): { name: string; modules: Module[] }[] {
  const groups = new Map<string, Module[]>();
  for (const module of modules) {
    const name = module.name.replace(/\.[qkv]_proj$/, ".qkv_proj").replace(/\.experts\.\d+\..*$/, ".experts");
    groups.set(name, [...groups.get(name) ?? [], module]);
  }
  return [...groups].map(([name, list]) => ({ name, modules: list }));
}
