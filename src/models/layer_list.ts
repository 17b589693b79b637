/**
 * The layer list of a model in its spellings: a pattern string, lists of names, objects with sizes per layer.
 * Pattern letters: M Mamba-2, * attention, - MLP, E experts; `|` (a pipeline boundary) is dropped, and
 * `/` separates the chain from the layers of the multi-token-prediction block.
 */
import { ConfigError } from "../tensor/errors.ts";
import { ConfigKeys, asObject, show } from "./config_keys.ts";

export type LayerKind = "mamba" | "attention" | "mlp" | "moe";
export type LayerLetter = "M" | "*" | "-" | "E";

/** Departures of one layer from the model's own sizes. */
export interface BlockConfig {
  readonly block_type: LayerKind;
  readonly intermediate_size?: number;
  readonly n_routed_experts?: number;
  readonly num_experts_per_tok?: number;
  readonly moe_intermediate_size?: number;
  readonly moe_latent_size?: number;
  readonly moe_shared_expert_intermediate_size?: number;
}

export const KIND_OF_NAME: Readonly<Record<string, LayerKind>> = {
  mamba: "mamba", linear_attention: "mamba", M: "mamba",
  attention: "attention", full_attention: "attention", "*": "attention",
  mlp: "mlp", "-": "mlp",
  moe: "moe", E: "moe",
};
const LETTER_OF_KIND: Readonly<Record<LayerKind, LayerLetter>> = {
  mamba: "M", attention: "*", mlp: "-", moe: "E",
};
const FOREIGN: Readonly<Record<string, string>> = {
  G: "gated delta-net", D: "sparse attention", "+": "multi-head latent attention",
};
const OVERRIDES = [
  "intermediate_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size",
  "moe_shared_expert_intermediate_size",
] as const;
const MAX_LAYERS = 4096;

/** The letter of a kind of layer in pattern strings. */
export function letterOf(kind: LayerKind): LayerLetter {
  return LETTER_OF_KIND[kind];
}

/** A checked layer list. `mtpPattern` is empty when there is no prediction block. */
export interface Chain {
  readonly pattern: string;
  readonly blocks: readonly BlockConfig[] | null;
  readonly mtpPattern: string;
  readonly mtpBlocks: readonly BlockConfig[] | null;
}

/** The layer list in whichever of its spellings it comes; several must agree. */
export function readChain(keys: ConfigKeys): Chain {
  const text = keys.get("hybrid_override_pattern");
  const [written, ...depths] = text === undefined ? [] : parsePattern(keys, "hybrid_override_pattern", text);
  const blocks = readBlocks(keys, "block_configs");
  const pattern = agree(keys, [
    ["block_configs", blocks && patternOf(blocks)],
    ["layers_block_type", readKinds(keys, "layers_block_type")],
    ["hybrid_override_pattern", written],
  ]);
  if (pattern === undefined || pattern === "") {
    return keys.fail("hybrid_override_pattern", "a layer list here or in layers_block_type", pattern);
  }
  if (pattern.length > MAX_LAYERS) {
    keys.fail("hybrid_override_pattern", `at most ${MAX_LAYERS} layers`, pattern.length);
  }

  const mtpText = keys.get("mtp_hybrid_override_pattern");
  const mtpWritten = mtpText === undefined ? [] : parsePattern(keys, "mtp_hybrid_override_pattern", mtpText);
  if (mtpWritten.length > 1) {
    keys.fail("mtp_hybrid_override_pattern", "the layers of one block, without /", mtpText);
  }
  const mtpBlocks = readBlocks(keys, "mtp_block_configs");
  const mtpPattern = agree(keys, [
    ["mtp_block_configs", mtpBlocks && patternOf(mtpBlocks)],
    ["mtp_layers_block_type", readKinds(keys, "mtp_layers_block_type")],
    ["mtp_hybrid_override_pattern", mtpWritten[0]],
    ...depths.map((depth): [string, string] => ["hybrid_override_pattern after /", depth]),
  ]) ?? "*E";
  const count = keys.integer("num_nextn_predict_layers", depths.length > 0 ? 1 : 0, 0, 1);
  if (count === 0) return { pattern, blocks, mtpPattern: "", mtpBlocks: null };
  if (mtpPattern === "") keys.fail("mtp_hybrid_override_pattern", "at least one layer", "");
  return { pattern, blocks, mtpPattern, mtpBlocks };
}

function agree(
  keys: ConfigKeys, spellings: readonly (readonly [string, string | null | undefined])[],
): string | undefined {
  let first: readonly [string, string] | undefined;
  for (const [key, pattern] of spellings) {
    if (pattern === undefined || pattern === null) continue;
    if (first && first[1] !== pattern) keys.fail(key, `the layers of ${first[0]}, ${first[1]}`, pattern);
    first ??= [key, pattern];
  }
  return first?.[1];
}

/** Splits a pattern at `/`, drops the pipeline separators `|` and checks every letter. */
function parsePattern(keys: ConfigKeys, key: string, text: unknown): string[] {
  if (typeof text !== "string") return keys.fail(key, "a string of the letters M * - E", text);
  [...text].forEach((letter, position) => {
    if ("M*-E|/".includes(letter)) return;
    const foreign = Object.hasOwn(FOREIGN, letter) ? ` (${FOREIGN[letter]!}, which is not supported)` : "";
    throw new ConfigError(
      `${keys.what}: ${key}: expected M, *, - or E at position ${position}, found ${show(letter)}${foreign}`,
    );
  });
  return text.replaceAll("|", "").split("/");
}

function readKinds(keys: ConfigKeys, key: string): string | undefined {
  return keys.list(key)?.map((name, i) => LETTER_OF_KIND[kindOf(keys, `${key}[${i}]`, name)]).join("");
}

function kindOf(keys: ConfigKeys, key: string, name: unknown): LayerKind {
  if (typeof name === "string" && Object.hasOwn(KIND_OF_NAME, name)) return KIND_OF_NAME[name]!;
  return keys.fail(key, "mamba, attention, mlp or moe", name);
}

function patternOf(blocks: readonly BlockConfig[]): string {
  return blocks.map(({ block_type }) => LETTER_OF_KIND[block_type]).join("");
}

function readBlocks(keys: ConfigKeys, key: string): readonly BlockConfig[] | null {
  return keys.list(key)?.map((entry, i) => {
    const at = `${key}[${i}]`;
    const values = asObject(entry) ?? keys.fail(at, "an object with block_type", entry);
    const block = new ConfigKeys(`${keys.what}: ${at}`, values);
    const read: { -readonly [K in keyof BlockConfig]: BlockConfig[K] } = {
      block_type: kindOf(keys, `${at}.block_type`, block.get("block_type")),
    };
    for (const name of OVERRIDES) {
      const size = block.integerOrNull(name, name === "moe_shared_expert_intermediate_size" ? 0 : 1);
      if (size !== null) read[name] = size;
    }
    for (const [name, value] of Object.entries(values)) {
      const known = name === "block_type" || value === null || OVERRIDES.some((size) => size === name);
      // Something else may be repeated for each layer, but changing it there would be lost silently.
      if (!known && JSON.stringify(value) !== JSON.stringify(keys.get(name))) {
        block.fail(name, `the model's own value (${show(keys.get(name))})`, value);
      }
    }
    return read;
  }) ?? null;
}
