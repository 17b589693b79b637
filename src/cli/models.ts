/** Finding a model on disk or among the presets, with its tokenizer. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { openFolder } from "../io/files.node.ts";
import { loadModel } from "../models/checkpoint.ts";
import { type NemotronHConfig, parseConfig } from "../models/config.ts";
import type { NemotronH } from "../models/nemotron_h.ts";
import type { WeightFormat } from "../models/parameters.ts";
import { preset, presetNames } from "../models/presets.ts";
import type { Device } from "../tensor/device.ts";
import { FormatError, UsageError } from "../tensor/errors.ts";
import { BYTE_VOCABULARY, byteTokenizer } from "../text/byte_tokenizer.ts";
import { hubTokenizer, type Tokenizer } from "../text/tokenizer.ts";

/**
 * The folder that holds config.json: the given one, or, for the output folder of a training run,
 * its newest checkpoint.
 * @throws UsageError when there is no such folder; FormatError when it holds no model.
 */
export function modelFolder(path: string): string {
  if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) {
    throw new UsageError(`The model folder ${path} does not exist.`);
  }
  if (existsSync(join(path, "config.json"))) return path;
  const latest = join(path, "latest");
  if (existsSync(latest)) {
    const name = readFileSync(latest, "utf8").trim();
    if (/^step-[\d-]+$/.test(name) && existsSync(join(path, name, "config.json"))) return join(path, name);
  }
  throw new FormatError(`The folder ${path} holds no model: expected config.json, found none.`);
}

/** Files beside the weights that a model made of another needs as well. */
const COMPANIONS = [
  "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
  "generation_config.json",
];

/** Those that a folder holds, by name. */
export function companionFiles(folder: string): Record<string, Uint8Array> {
  const found = COMPANIONS.filter((name) => existsSync(join(folder, name)));
  return Object.fromEntries(found.map((name) => [name, readFileSync(join(folder, name))]));
}

/** Config of a preset name, a config.json file or a model folder. */
export function findConfig(nameOrPath: string, options: { dt_min_clamp?: boolean } = {}): NemotronHConfig {
  if (presetNames().includes(nameOrPath)) return preset(nameOrPath);
  const stats = statSync(nameOrPath, { throwIfNoEntry: false });
  if (!stats) {
    throw new UsageError(
      `"${nameOrPath}" is neither a preset (${presetNames().join(", ")}) nor an existing file or folder.`);
  }
  const file = stats.isDirectory() ? join(modelFolder(nameOrPath), "config.json") : nameOrPath;
  return parseConfig(readFileSync(file), { what: file, ...options });
}

/** A tokenizer and the files it came from, to be kept with a checkpoint trained with it. */
export interface FoundTokenizer {
  readonly tokenizer: Tokenizer;
  readonly files: Readonly<Record<string, string>>;
}

/**
 * The tokenizer of a tokenizer.json or of a folder that holds one;
 * bytes where there is none and the vocabulary allows it.
 * @throws UsageError for a path that does not exist;
 *   FormatError when the vocabulary is smaller than the tokenizer's.
 */
export function findTokenizer(path: string | null, vocabSize: number): FoundTokenizer {
  const isFolder = path !== null && statSync(path, { throwIfNoEntry: false })?.isDirectory();
  const file = isFolder ? join(path, "tokenizer.json") : path;
  if (file && !isFolder && !existsSync(file)) {
    throw new UsageError(`The tokenizer file ${file} does not exist.`);
  }
  if (!file || !existsSync(file)) {
    if (vocabSize >= BYTE_VOCABULARY) return { tokenizer: byteTokenizer(vocabSize), files: {} };
    throw new FormatError(
      `${path ?? "The model"} has no tokenizer.json, and bytes need a vocabulary of at least ` +
      `${BYTE_VOCABULARY}, found ${vocabSize}.`);
  }
  const settings = join(dirname(file), "tokenizer_config.json");
  const files: Record<string, string> = { "tokenizer.json": readFileSync(file, "utf8") };
  if (existsSync(settings)) files["tokenizer_config.json"] = readFileSync(settings, "utf8");
  const tokenizer = hubTokenizer(files["tokenizer.json"]!, files["tokenizer_config.json"]);
  if (tokenizer.vocabSize > vocabSize) {
    throw new FormatError(
      `The tokenizer ${file} has ${tokenizer.vocabSize} ids, but the model's vocabulary only ${vocabSize}.`);
  }
  return { tokenizer, files };
}

/** Loads a checkpoint folder onto a device. */
export async function openModel(
  device: Device, path: string,
  options: { dt_min_clamp?: boolean; trainable?: boolean; weights?: WeightFormat } = {},
): Promise<{ model: NemotronH; folder: string }> {
  const folder = modelFolder(path);
  const config = findConfig(folder, options.dt_min_clamp ? { dt_min_clamp: true } : {});
  const model = await loadModel(
    device, config, openFolder(folder), options.trainable ?? false, options.weights ?? "f32");
  return { model, folder };
}
