import { type GenerateOptions, Generator } from "../../infer/engine.ts";
import { generateText, type TextRun } from "../../infer/text.ts";
import { pipelinesOf } from "../../kernel/pipelines.ts";
import { openDevice } from "../../tensor/device.ts";
import { KV_FORMATS } from "../../models/nemotron_h.ts";
import { WEIGHT_FORMATS } from "../../models/parameters.ts";
import { UsageError } from "../../tensor/errors.ts";
import { defineCommand } from "../args.ts";
import { openFolder } from "../../io/files.node.ts";
import { inspectCheckpoint } from "../../models/checkpoint.ts";
import { findConfig, findTokenizer, modelFolder, openModel } from "../models.ts";
import { colours, wantsColour } from "../terminal.ts";

export const generate = defineCommand({
  name: "generate",
  summary: "Continue a prompt.",
  options: {
    model: {
      type: "string", value: "DIR", required: true,
      help: "A checkpoint folder, or the output folder of a training run.",
    },
    prompt: { type: "string", value: "TEXT", help: "What to continue." },
    promptTokens: {
      type: "string", value: "IDS",
      help: "The prompt as token ids with commas between them, instead of --prompt.",
    },
    maxTokens: { type: "integer", min: 1, default: 200, help: "Most tokens to add." },
    temperature: { type: "number", min: 0, default: 0, help: "0 takes the most probable token." },
    topK: { type: "integer", min: 0, default: 0, help: "Draw from the K most probable tokens; 0: all." },
    topP: {
      type: "number", min: 0, max: 1, default: 1,
      help: "Draw from the most probable tokens that reach this probability.",
    },
    minP: {
      type: "number", min: 0, max: 1, default: 0,
      help: "Leave out tokens below this share of the best one's probability.",
    },
    seed: { type: "integer", min: 0, default: 0, help: "Decides the draws." },
    stop: { type: "string", value: "TEXT", multiple: true, help: "End before this text appears." },
    draft: {
      type: "integer", min: 0, max: 16, default: 0,
      help: "Tokens that the model's own MTP head drafts per pass; 0: none.",
    },
    weights: {
      type: "string", choices: WEIGHT_FORMATS, default: "f32",
      help: "How matrices that the checkpoint holds as plain numbers lie in memory: f32, f16 or bf16, or " +
        "in blocks of 16 or 32 values of 8 or 4 bits with a scale (tables of tokens never below 8).",
    },
    kvCache: {
      type: "string", choices: KV_FORMATS,
      help: "How keys and values are kept; default: fp8 for a checkpoint with scales for it, else f32.",
    },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    json: { type: "boolean", help: "Print one JSON object instead of the text." },
  },
  examples: [
    'krait generate --model runs/first --prompt "export function "',
    'krait generate --model runs/first --prompt "Once" --weights q4',
    'krait generate --model runs/first --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7 --draft 3',
  ],
  async run({ options, stdout, stderr, env, signal }) {
    if ((options.prompt === undefined) === (options.promptTokens === undefined)) {
      throw new UsageError("Give the prompt either as --prompt TEXT or as --prompt-tokens IDS.");
    }
    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    try {
      const folder = modelFolder(options.model);
      const config = findConfig(folder);
      const settings: GenerateOptions = {
        maxTokens: options.maxTokens, draft: options.draft,
        sampling: {
          temperature: options.temperature, top_k: options.topK, top_p: options.topP, min_p: options.minP,
          seed: options.seed,
        },
      };
      const pipelines = pipelinesOf(device);
      const prepare = async () => {
        const { tokenizer } = findTokenizer(folder, config.vocab_size);
        const prompt = options.prompt === undefined
          ? parseIds(options.promptTokens!)
          : [...(tokenizer.bosId === null ? [] : [tokenizer.bosId]), ...tokenizer.encode(options.prompt)];
        const stored = await inspectCheckpoint(config, openFolder(folder));
        Generator.warmUp(device, config, prompt.length, {
          ...settings, weights: options.weights, kept: stored.kept, kv: options.kvCache ?? stored.kv,
        });
        const formats = [...new Set(stored.kept.values()), options.weights];
        return { tokenizer, prompt, formats: formats.join(", ") };
      };
      // Kernels compile while the weights are read. What is wrong with the weights is said first.
      const loading = openModel(device, options.model, { weights: options.weights });
      const preparing = prepare();
      await Promise.allSettled([loading, preparing]);
      const { model } = await loading;
      const { tokenizer, prompt, formats } = await preparing;
      const weightBytes = device.pool.liveBytes;
      const kv = options.kvCache ?? model.kvFormat;
      const generator = new Generator(model, prompt.length + options.maxTokens + options.draft, kv);
      const run: TextRun =
        generateText(generator, tokenizer, prompt, { ...settings, stopStrings: options.stop, signal });
      if (!options.json && options.prompt !== undefined) stdout.write(options.prompt);
      let text = "";
      let firstMs = 0;
      for await (const piece of run.pieces) {
        firstMs ||= performance.now(); // since the process started
        text += piece;
        if (!options.json) stdout.write(piece);
      }
      const { stats } = generator;
      const speed = (1000 * Math.max(0, stats.tokens - 1)) / Math.max(stats.decodeMs, 1e-9);
      const summary = {
        text, tokens: run.tokens, prompt_tokens: stats.promptTokens, first_token_ms: firstMs,
        compile_ms: pipelines.compileMs, prefill_ms: stats.prefillMs,
        decode_ms: stats.decodeMs, tokens_per_s: speed,
        weights: formats, weight_bytes: weightBytes,
        kv_cache: kv, kv_bytes: generator.kvBytes,
        passes: stats.passes, drafted: stats.drafted, accepted: stats.accepted,
        acceptance: stats.drafted > 0 ? stats.accepted / stats.drafted : null, stopped: run.stopped,
      };
      if (options.json) stdout.write(`${JSON.stringify(summary)}\n`);
      else {
        const drafts = stats.drafted > 0
          ? `, ${stats.accepted} of ${stats.drafted} drafts accepted ` +
            `(${(100 * stats.accepted / stats.drafted).toFixed(0)} %)`
          : "";
        stdout.write("\n");
        stderr.write(colours(wantsColour(stderr, env)).dim(
          `${stats.tokens} tokens, ${speed.toFixed(1)} tokens/s after a prompt of ${stats.promptTokens} in ` +
          `${stats.prefillMs.toFixed(0)} ms${drafts}, ${(weightBytes / 2 ** 20).toFixed(1)} MiB of ` +
          `${formats} weights, on ${device.info.id}; the first after ` +
          `${(firstMs / 1000).toFixed(2)} s in all, kernels compiled for ` +
          `${(pipelines.compileMs / 1000).toFixed(2)} s\n`));
      }
      generator.dispose();
    } finally {
      device.destroy();
    }
  },
});

function parseIds(text: string): number[] {
  return text.split(",").map((part) => {
    if (!/^\s*\d+\s*$/.test(part)) {
      throw new UsageError(`--prompt-tokens must be numbers with commas between them, found "${part}".`);
    }
    return Number(part);
  });
}
