import { existsSync, rmSync } from "node:fs";
import { join, relative } from "node:path";
import { Generator } from "../../infer/engine.ts";
import { GREEDY, type Sampling } from "../../infer/sampling.ts";
import { generateText } from "../../infer/text.ts";
import type { NemotronH } from "../../models/nemotron_h.ts";
import { countParameters, layerStrip } from "../../models/accounting.ts";
import { preset } from "../../models/presets.ts";
import { parseLayout } from "../../parallel/layout.ts";
import { openDevice } from "../../tensor/device.ts";
import type { Tokenizer } from "../../text/tokenizer.ts";
import { byteTokenizer } from "../../text/byte_tokenizer.ts";
import { splitDocuments } from "../../train/data.ts";
import { typescriptDeclarations } from "../../train/data.node.ts";
import { makeRecipe } from "../../train/recipe.ts";
import { defineCommand } from "../args.ts";
import { packagePath } from "../package.ts";
import { Progress } from "../progress.ts";
import { colours, formatBytes, formatCount, formatDuration, table, wantsColour } from "../terminal.ts";
import { runTraining } from "../training.ts";

const PROMPT = "export interface ";
const NEW_TOKENS = 160;
const DRAFTS = 2;
const WARM_UP_TOKENS = 8;
const SAMPLED: Sampling = { temperature: 0.6, top_k: 0, top_p: 0.95, min_p: 0, seed: 0 };

export const quickstart = defineCommand({
  name: "quickstart",
  summary: "Train the tiny hybrid on this clone's TypeScript declarations, then continue a prompt.",
  options: {
    steps: { type: "integer", min: 1, default: 240, help: "Optimiser updates." },
    seed: { type: "integer", min: 0, default: 0, help: "Decides weights and data order." },
    out: {
      type: "string", value: "DIR", default: "runs/quickstart",
      help: "Folder to write; what it held is replaced.",
    },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    json: { type: "boolean", help: "Print one JSON object with the results." },
  },
  async run({ options, stdout, stderr, env, signal }) {
    const started = performance.now();
    const c = colours(wantsColour(stdout, env));
    const say = (text = "") => {
      if (!options.json) stdout.write(`${text}\n`);
    };
    const config = preset("tiny");
    const recipe = makeRecipe({ steps: options.steps, seed: options.seed });
    const modules = packagePath("node_modules");
    const split = splitDocuments(typescriptDeclarations(existsSync(modules) ? modules : "node_modules"), {
      seed: 0, fraction: 0.04,
    });
    const tokenizer = byteTokenizer(config.vocab_size);
    if (existsSync(join(options.out, "metrics.jsonl"))) rmSync(options.out, { recursive: true });

    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    const progress = new Progress({ total: recipe.steps, silent: options.json, stream: stderr, env });
    try {
      const { total, active } = countParameters(config);
      say(c.bold(`Krait quickstart on ${device.info.name}`));
      say(
        `\n${layerStrip(config)}\n\n${formatCount(total)} parameters, ${formatCount(active)} active per ` +
        `token; byte level, seed ${recipe.seed}\n`);
      const { run, baselines, evaluation, checkpoint, interrupted } = await runTraining({
        devices: [device], layout: parseLayout("tp=1"), config, recipe, split, tokenizer,
        tokenizerFiles: {}, out: options.out, resume: false,
        saveEvery: 0, keep: 1, signal,
        onStep(step) {
          progress.update({ step: step.step + 1, loss: step.loss, tokensPerSecond: step.tokens_per_s });
        },
      });
      progress.done();
      if (interrupted || !evaluation) return 130;
      const tokens = run.trainer.steps * recipe.batch * recipe.seqlen * recipe.accumulate;
      const trainSeconds = (performance.now() - started) / 1000;
      say(c.bold("Bits per byte on held-out files"));
      say(table([
        ...(["unigram", "bigram", "trigram"] as const)
          .map((name) => [` ${name}`, baselines[name].bitsPerByte.toFixed(3)]),
        [c.green(" this model"), c.green(evaluation.bits_per_byte.toFixed(3))],
      ]));
      say(
        `${formatCount(tokens)} tokens in ${formatDuration(trainSeconds)}; peak GPU memory ` +
        `${formatBytes(device.pool.peakBytes)}`);
      run.dispose();

      const plain = await speak(run.model, tokenizer, 0, GREEDY, signal);
      const drafted = await speak(run.model, tokenizer, DRAFTS, GREEDY, signal);
      const sampled = await speak(run.model, tokenizer, DRAFTS, { ...SAMPLED, seed: options.seed }, signal);
      const identical = plain.text === drafted.text;
      const show = (title: string, text: string) => say(`\n${c.bold(title)}\n${c.dim(PROMPT)}${text}`);
      show(`It continues, drawn at temperature ${SAMPLED.temperature}`, sampled.text);
      show("and with the most probable byte each time, plainly", plain.text);
      show("and the same with its MTP head drafting", drafted.text);
      say();
      say(table([
        [" plain decode", `${plain.speed.toFixed(1)} tokens/s`],
        [" drafting with its MTP head", `${drafted.speed.toFixed(1)} tokens/s`,
          `${(100 * drafted.acceptance).toFixed(0)} % of drafts accepted`],
      ]));
      say(identical ? "Both texts are identical." : c.red("The two texts differ."));
      say(`\nWritten: ${[checkpoint, join(options.out, "metrics.jsonl"), join(options.out, "loss.svg")]
        .map((path) => relative(".", path)).join(", ")}`);
      say(
        `Total ${formatDuration((performance.now() - started) / 1000)}. Next: npx krait generate --model ` +
        `${options.out} --prompt "import "`);
      if (options.json) {
        stdout.write(`${JSON.stringify({
          adapter: device.info.id, steps: recipe.steps, seconds: (performance.now() - started) / 1000, tokens,
          bits_per_byte: evaluation.bits_per_byte, unigram: baselines.unigram.bitsPerByte,
          bigram: baselines.bigram.bitsPerByte, trigram: baselines.trigram.bitsPerByte,
          plain_tokens_per_s: plain.speed, drafted_tokens_per_s: drafted.speed,
          acceptance: drafted.acceptance, identical, checkpoint,
        })}\n`);
      }
      return identical ? 0 : 1;
    } finally {
      device.destroy();
    }
  },
});

async function speak(
  model: NemotronH, tokenizer: Tokenizer, draft: number, sampling: Sampling, signal: AbortSignal,
): Promise<{ text: string; speed: number; acceptance: number }> {
  const prompt = tokenizer.encode(PROMPT);
  const generator = new Generator(model, prompt.length + NEW_TOKENS + DRAFTS);
  const run = async (maxTokens: number) => {
    let text = "";
    const { pieces } = generateText(generator, tokenizer, prompt, { maxTokens, draft, sampling, signal });
    for await (const piece of pieces) text += piece;
    return text;
  };
  await run(WARM_UP_TOKENS); // compiles
  const text = await run(NEW_TOKENS);
  const { stats } = generator;
  generator.dispose();
  return {
    text, speed: (1000 * (stats.tokens - 1)) / stats.decodeMs,
    acceptance: stats.drafted > 0 ? stats.accepted / stats.drafted : 0,
  };
}
