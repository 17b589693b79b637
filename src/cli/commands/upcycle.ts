import { checkFree, openFolder, writeFolder } from "../../io/files.node.ts";
import { openTensors } from "../../io/safetensors.ts";
import { countParameters } from "../../models/accounting.ts";
import { readParameters, storedFiles } from "../../models/checkpoint.ts";
import { type UpcycleOptions, upcycledConfig, upcycledValues } from "../../models/upcycle.ts";
import { defineCommand } from "../args.ts";
import { companionFiles, findConfig, modelFolder } from "../models.ts";
import { formatCount } from "../terminal.ts";

export const upcycle = defineCommand({
  name: "upcycle",
  summary: "Make a mixture of experts of a dense checkpoint.",
  description:
    "Every MLP becomes a layer of routed experts: its hidden units are cut into --granularity shards, and " +
    "the experts are copies of these. With --topk a multiple of the granularity the new model computes " +
    "what the dense one did, until it is trained further.",
  options: {
    model: {
      type: "string", value: "DIR", required: true,
      help: "A checkpoint folder, or the output folder of a training run.",
    },
    experts: { type: "integer", min: 1, required: true, help: "Experts of a layer." },
    granularity: { type: "integer", min: 1, default: 1, help: "Shards that an MLP is cut into." },
    topk: { type: "integer", min: 1, required: true, help: "Experts per token." },
    score: {
      type: "string", choices: ["softmax_chosen", "softmax", "sigmoid", "sqrtsoftplus"],
      default: "softmax_chosen",
      help: "What routers make of their logits; softmax, over all experts, keeps the loss only roughly.",
    },
    seed: { type: "integer", min: 0, default: 0, help: "Of the routers." },
    out: { type: "string", value: "DIR", required: true, help: "The folder to write; must not exist." },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: ["krait upcycle --model runs/dense --experts 16 --granularity 2 --topk 4 --out upcycled"],
  async run({ options, stdout, signal }) {
    const folder = modelFolder(options.model);
    const dense = findConfig(folder);
    const wishes: UpcycleOptions = options;
    const config = upcycledConfig(dense, wishes);
    await checkFree(options.out);
    const reader = await openTensors(openFolder(folder));
    try {
      const read = new Map<string, () => Promise<Float32Array>>();
      await readParameters(dense, reader, async (name, values) => {
        read.set(name, values);
      }, folder);
      await writeFolder(options.out, {
        ...companionFiles(folder),
        ...storedFiles(config, (parameter) => ({
          dtype: "f32",
          bytes: async () => {
            signal.throwIfAborted();
            const values = await upcycledValues(config, parameter, (name) => read.get(name)!(), wishes);
            return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
          },
        })),
      });
    } finally {
      await reader.close();
    }
    const [before, after] = [countParameters(dense), countParameters(config)];
    const exact = options.score !== "softmax" && options.topk % options.granularity === 0;
    if (options.json) {
      stdout.write(`${JSON.stringify({
        out: options.out, experts: options.experts, width: config.moe_intermediate_size, topk: options.topk,
        parameters_before: before.total, parameters: after.total, active_parameters: after.active, exact,
      })}\n`);
      return;
    }
    stdout.write(
      `${options.out}: ${options.experts} experts of width ${config.moe_intermediate_size}, ` +
      `${options.topk} per token; ${formatCount(before.total)} parameters became ` +
      `${formatCount(after.total)} (${formatCount(after.active)} active)\n` +
      `It computes ${exact ? "" : "roughly "}what the dense model did.\n`);
  },
});
