import { existsSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import {
  countLayers, countParameters, countTensors, layerStrip, memoryToRun, memoryToTrain, stateBytes,
  trainingBytes, type RunFormat, type TrainFormats,
} from "../../models/accounting.ts";
import { inspectCheckpoint, type StoredPart } from "../../models/checkpoint.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import { openFolder } from "../../io/files.node.ts";
import { isObject, parseJson } from "../../io/json.ts";
import { INDEX_FILE, SINGLE_FILE } from "../../io/safetensors.ts";
import { defineCommand } from "../args.ts";
import { findConfig, modelFolder } from "../models.ts";
import { colours, formatBytes, formatCount, table, wantsColour } from "../terminal.ts";

const FORMATS: readonly RunFormat[] = ["f32", "bf16", "f16", "fp8", "nvfp4"];

/** Formats of `krait train`, the smaller the lower. */
const TRAINED: readonly TrainFormats[] = [
  { weights: "f32", master: "f32", moments: "f32" }, { weights: "f32", master: "f32", moments: "bf16" },
  { weights: "f32", master: "f32", moments: "8bit" }, { weights: "bf16", master: "f32", moments: "8bit" },
  { weights: "bf16", master: "none", moments: "8bit" },
];

export const info = defineCommand({
  name: "info",
  summary: "Show a model's layers, parameters, state and memory.",
  positionals: [{ name: "PRESET|DIR", help: "A preset's name, a config.json or a model folder." }],
  options: {
    batch: { type: "integer", min: 1, default: 1, help: "Sequences for the memory figures." },
    tokens: { type: "integer", min: 1, default: 4096, help: "Tokens per sequence for the memory figures." },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: ["krait info nemotron-3-nano-30b-a3b", "krait info runs/first --json"],
  async run({ options, args, stdout, env }) {
    const config = findConfig(args[0]!);
    const stored = await examineFolder(args[0]!, config);
    const facts = { ...examine(config, options.batch, options.tokens), ...(stored ? { stored } : {}) };
    stdout.write(options.json ? `${JSON.stringify(facts, null, 2)}\n`
      : render(args[0]!, config, facts, colours(wantsColour(stdout, env))));
  },
});

interface StoredFacts {
  readonly parts: readonly (StoredPart & { readonly bits_per_weight: number })[];
  readonly bits_per_weight: number;
  readonly bytes: number;
  readonly kv_cache: string;
  /** What hf_quant_config.json or config.json says, which decides nothing. */
  readonly metadata: string | null;
}

/** What the weights of a model folder are stored in; null for presets and folders without weights. */
async function examineFolder(path: string, config: NemotronHConfig): Promise<StoredFacts | null> {
  if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) return null;
  const folder = modelFolder(path);
  if (![INDEX_FILE, SINGLE_FILE].some((file) => existsSync(join(folder, file)))) return null;
  const { parts, kv } = await inspectCheckpoint(config, openFolder(folder));
  const sum = (key: "weights" | "bytes") => parts.reduce((total, part) => total + part[key], 0);
  return {
    parts: parts.map((part) => ({ ...part, bits_per_weight: (8 * part.bytes) / part.weights })),
    bits_per_weight: (8 * sum("bytes")) / sum("weights"), bytes: sum("bytes"), kv_cache: kv,
    metadata: quantisationMetadata(folder),
  };
}

function quantisationMetadata(folder: string): string | null {
  const read = (file: string, key: string) => {
    if (!existsSync(join(folder, file))) return undefined;
    const value = parseJson(readFileSync(join(folder, file)), { what: file, nonFinite: true });
    return isObject(value) && isObject(value[key]) ? value[key] : undefined;
  };
  const said = read("hf_quant_config.json", "quantization") ?? read("config.json", "quantization_config");
  const name = said?.["quant_algo"] ?? said?.["format"] ?? said?.["quant_method"];
  return typeof name === "string" ? name : null;
}

function examine(config: NemotronHConfig, batch: number, tokens: number) {
  const { total, backbone, mtp, active } = countParameters(config);
  return {
    pattern: config.hybrid_override_pattern, mtp_pattern: config.mtp_hybrid_override_pattern,
    layers: countLayers(config.hybrid_override_pattern),
    parameters: { total, backbone, mtp, active }, checkpoint_tensors: countTensors(config),
    // As published: SSM state in the config's own format, keys and values in bf16.
    // This engine keeps all of it in f32.
    state: stateBytes(config, { kv: "bfloat16" }),
    state_f32: stateBytes(config, { ssm: "float32", conv: "float32", kv: "float32" }),
    batch, tokens,
    run: Object.fromEntries(FORMATS.map((format) => [format, memoryToRun(config, format, batch, tokens)])),
    train: memoryToTrain(config, batch * tokens),
    train_formats: TRAINED.map((formats) => {
      const { weights, gradients, optimizer } = memoryToTrain(config, 0, formats);
      return {
        ...formats, bytes_per_parameter: trainingBytes(formats).total, bytes: weights + gradients + optimizer,
      };
    }),
  };
}

function render(
  name: string, config: NemotronHConfig, facts: ReturnType<typeof examine> & { stored?: StoredFacts },
  c: ReturnType<typeof colours>,
): string {
  const { parameters: p, state, state_f32: f32, train, batch, tokens } = facts;
  const exact = (count: number) => `${count.toLocaleString("en-US")} (${formatCount(count)})`;
  return [
    c.bold(name), "", layerStrip(config),
    "", c.bold("Parameters"),
    table([
      [" total", exact(p.total)], [" active per token", exact(p.active)],
      ...(p.mtp > 0 ? [[" backbone", exact(p.backbone)], [" MTP", exact(p.mtp)]] : []),
      [" tensors in a checkpoint", String(facts.checkpoint_tensors)],
    ]),
    ...(facts.stored ? renderStored(facts.stored, c) : []),
    "", c.bold("State of one sequence"),
    table([
      [" SSM state, each Mamba layer", `${formatBytes(state.ssmPerLayer)}`],
      [" SSM state, all layers", formatBytes(state.ssm)], [" convolution", formatBytes(state.conv)],
      [" keys and values, per token",
        `${state.kvPerToken} bytes in bf16, ${f32.kvPerToken} in f32, ${f32.kvPerToken / 4} in fp8`],
    ]),
    "", c.bold(`Memory to run ${batch} x ${tokens} tokens`),
    table(Object.entries(facts.run).map(([format, memory]) => [
      ` ${format}`, formatBytes(memory.total),
      `weights ${formatBytes(memory.weights)}`, `state ${formatBytes(memory.state)}`,
    ])),
    "", c.bold(`Memory to train on ${batch} x ${tokens} tokens, f32`),
    table([
      [" total", formatBytes(train.total), "AdamW, without recomputation"],
      [" weights", formatBytes(train.weights)],
      [" gradients", formatBytes(train.gradients)], [" moments", formatBytes(train.optimizer)],
      [" activations, about", formatBytes(train.activations)],
    ]),
    "", c.bold("Weights, gradients and moments in training"),
    table(facts.train_formats.map(({ weights, master, moments, bytes_per_parameter, bytes }) => [
      ` ${weights}${weights === "bf16" ? `, ${master === "none" ? "no" : master} masters` : ""}, ` +
      `${moments} moments`, formatBytes(bytes), `${bytes_per_parameter} bytes per parameter of a matrix`,
    ])), "",
  ].join("\n");
}

function renderStored(stored: StoredFacts, c: ReturnType<typeof colours>): string[] {
  const bits = (x: number) => `${x.toFixed(3)} bits per weight`;
  return [
    "", c.bold(`Stored weights${stored.metadata === null ? "" : `, ${stored.metadata} by their metadata`}`),
    table([
      ...stored.parts.map((part) => [
        ` ${part.format}`, `${formatCount(part.weights)} weights in ${part.tensors} tensors`,
        formatBytes(part.bytes), bits(part.bits_per_weight),
      ]),
      [" all", "", formatBytes(stored.bytes), bits(stored.bits_per_weight)],
      ...(stored.kv_cache === "fp8" ? [[" keys and values", "with scales for fp8"]] : []),
    ]),
  ];
}
