import {
  countLayers, countParameters, countTensors, layerStrip, memoryToRun, memoryToTrain, stateBytes,
  type RunFormat,
} from "../../models/accounting.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import { defineCommand } from "../args.ts";
import { findConfig } from "../models.ts";
import { colours, formatBytes, formatCount, table, wantsColour } from "../terminal.ts";

const FORMATS: readonly RunFormat[] = ["f32", "bf16", "f16", "fp8", "nvfp4"];

export const info = defineCommand({
  name: "info",
  summary: "Show a model's layers, parameters, state and memory.",
  positionals: [{ name: "PRESET|DIR", help: "a preset's name, a config.json or a model folder" }],
  options: {
    batch: { type: "integer", min: 1, default: 1, help: "Sequences for the memory figures." },
    tokens: { type: "integer", min: 1, default: 4096, help: "Tokens per sequence for the memory figures." },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: ["krait info nemotron-3-nano-30b-a3b", "krait info runs/first --json"],
  run({ options, args, stdout, env }) {
    const config = findConfig(args[0]!);
    const facts = examine(config, options.batch, options.tokens);
    stdout.write(options.json ? `${JSON.stringify(facts, null, 2)}\n`
      : render(args[0]!, config, facts, colours(wantsColour(stdout, env))));
  },
});

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
  };
}

function render(
  name: string, config: NemotronHConfig, facts: ReturnType<typeof examine>, c: ReturnType<typeof colours>,
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
    ]), "",
  ].join("\n");
}
