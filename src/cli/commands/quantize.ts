import { readFileSync } from "node:fs";
import { join } from "node:path";
import { calibrationData, meanLoss } from "../../compress/calibrate.ts";
import { TARGET_FORMATS } from "../../compress/encode.ts";
import { quantisationConfigs, tensorFiles, withKey } from "../../compress/export.ts";
import { defaultExclusions } from "../../compress/modules.ts";
import { METHODS, type ModuleReport, type Quantised, quantiseModel } from "../../compress/quantise.ts";
import { checkFree, openFolder, writeFolder } from "../../io/files.node.ts";
import { storedFormat } from "../../io/quantized.ts";
import { openTensors } from "../../io/safetensors.ts";
import { resolveTensors } from "../../models/checkpoint_names.ts";
import { loadModel } from "../../models/checkpoint.ts";
import { openDevice } from "../../tensor/device.ts";
import { UsageError } from "../../tensor/errors.ts";
import { readDocuments } from "../../train/data.node.ts";
import { tokenizeDocuments } from "../../train/packing.ts";
import { defineCommand } from "../args.ts";
import { companionFiles, findConfig, findTokenizer, modelFolder } from "../models.ts";
import { packageVersion } from "../package.ts";
import { Progress } from "../progress.ts";
import { colours, formatBytes, formatCount, table, wantsColour } from "../terminal.ts";

export const quantize = defineCommand({
  name: "quantize",
  summary: "Quantise a checkpoint to FP8, MXFP8, NVFP4 or a mixture of them.",
  description:
    "Runs the model over some text, chooses scales, and writes a folder in the published ModelOpt layout. " +
    "What stays as it is by default: lm_head, embeddings, attention and the Mamba layers before it, latent " +
    "projections and prediction layers; always: routers, convolutions and norms. `mixed` measures what " +
    "every layer loses in nvfp4, fp8 and bf16 and spends the budget of --bits where it helps most.",
  options: {
    model: {
      type: "string", value: "DIR", required: true,
      help: "A checkpoint folder, or the output folder of a training run.",
    },
    format: {
      type: "string", choices: [...TARGET_FORMATS, "mixed"], required: true, help: "Of the matrices.",
    },
    calib: {
      type: "string", value: "PATH", required: true, multiple: true,
      help: "Text to calibrate with: a file (.jsonl: one document per line) or a folder.",
    },
    out: { type: "string", value: "DIR", required: true, help: "The folder to write; must not exist." },
    method: {
      type: "string", choices: METHODS, default: "max",
      help: "How scales are chosen: by the largest value, by the least squared error, or after scaling the " +
        "input channels that matter (AWQ).",
    },
    bits: {
      type: "number", value: "BUDGET",
      help: "For mixed: bits per weight of what may be quantised, such as 6.",
    },
    exclude: {
      type: "string", value: "PATTERN", multiple: true,
      help: "Modules to leave as they are beside the default ones, by name; * stands for any text.",
    },
    defaultExcludes: { type: "boolean", default: true, help: "Leave out what releases leave out." },
    kvCache: { type: "string", choices: ["fp8"], help: "Store scales for keys and values in FP8." },
    distill: {
      type: "integer", min: 1, value: "STEPS",
      help: "Then train the quantised matrices towards the model's own predictions on the same text.",
    },
    distillLr: { type: "number", min: 0, default: 1e-4, help: "Learning rate of --distill." },
    samples: { type: "integer", min: 1, default: 64, help: "Rows of text to calibrate with, at most." },
    seqlen: { type: "integer", min: 32, default: 256, help: "Tokens of a row." },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: [
    "krait quantize --model runs/first --format nvfp4 --calib notes.txt --out first-nvfp4",
    "krait quantize --model DIR --format mixed --bits 6 --method mse --calib data --out DIR-mixed",
    "krait quantize --model DIR --format fp8 --kv-cache fp8 --exclude '*.out_proj' --calib data --out DIR8",
  ],
  async run({ options, stdout, stderr, env, signal }) {
    if ((options.format === "mixed") !== (options.bits !== undefined)) {
      throw new UsageError(options.format === "mixed" ? "--format mixed needs a budget: --bits BUDGET."
        : `--bits belongs to --format mixed, found --format ${options.format}.`);
    }
    const folder = modelFolder(options.model);
    await checkFree(options.out);
    const config = findConfig(folder);
    const { tokenizer } = findTokenizer(folder, config.vocab_size);
    const corpus = tokenizeDocuments(readDocuments(options.calib), tokenizer);
    const data = calibrationData(corpus, options.seqlen, options.samples);
    const reader = await openTensors(openFolder(folder));
    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    const progress = new Progress({ label: "stage", silent: options.json, stream: stderr, env });
    let stages = 0;
    let latest = "";
    try {
      for (const { tensors } of resolveTensors(config, reader.tensors, { what: folder })) {
        const coded = tensors.find((name) => storedFormat(reader.tensors, name) !== null);
        if (coded !== undefined) {
          throw new UsageError(
            `${folder} is quantised already: expected floats in "${coded}", found ` +
            `${storedFormat(reader.tensors, coded)}.`);
        }
      }
      const model = await loadModel(device, config, openFolder(folder));
      const quantised = await quantiseModel(model, reader, data, {
        format: options.format, method: options.method, bits: options.bits,
        exclude: [...options.defaultExcludes ? defaultExclusions(config) : [], ...options.exclude],
        kvCache: options.kvCache !== undefined,
        distill: options.distill === undefined ? undefined
          : { steps: options.distill, lr: options.distillLr },
      }, (phase, done, total) => {
        signal.throwIfAborted();
        if (phase !== latest) stages++;
        latest = phase;
        progress.update({ step: stages, note: `${phase} ${done} of ${total}` });
      });
      model.dispose();
      for (const pattern of quantised.unmatched) {
        if (options.exclude.includes(pattern)) progress.log(`--exclude ${pattern} matches no module`);
      }
      const configs = quantisationConfigs({
        modules: quantised.modules, mixed: options.format === "mixed", excluded: quantised.excluded,
        kvCache: options.kvCache !== undefined, version: packageVersion(),
      });
      let lossAfter = 0;
      await writeFolder(options.out, {
        ...tensorFiles(quantised.entries),
        "config.json": withKey(
          readFileSync(join(folder, "config.json"), "utf8"), "quantization_config",
          configs.quantization_config),
        "hf_quant_config.json": `${JSON.stringify(configs.hf_quant_config, null, 2)}\n`,
        ...companionFiles(folder),
      }, async (path) => {
        progress.update({ step: ++stages, note: "evaluating what was written" });
        const written = await loadModel(device, config, openFolder(path));
        lossAfter = await meanLoss(written, data.evaluation);
        written.dispose();
        signal.throwIfAborted();
      });
      const summary = summarise(quantised, lossAfter, {
        format: options.format, method: options.method, out: options.out, adapter: device.info.id,
        calibration_tokens: data.tokens, evaluated_on: data.shared ? "calibration rows" : "rows held out",
      });
      progress.done(`written to ${options.out}`);
      stdout.write(options.json ? `${JSON.stringify(summary)}\n`
        : render(quantised, summary, colours(wantsColour(stdout, env))));
    } finally {
      progress.done();
      await reader.close();
      device.destroy();
    }
  },
});

function summarise<F extends object>(quantised: Quantised, lossAfter: number, facts: F) {
  const { reports, sensitivities, loss_before, module_bits, bits, bytes, excluded } = quantised;
  return {
    ...facts, layers: reports, excluded: excluded.length,
    ...(sensitivities.length > 0 ? { sensitivities } : {}),
    bits_per_quantised_weight: module_bits, bits_per_weight: bits, bytes_per_weight: bits / 8, bytes,
    ...(quantised.distilled ? { distilled: quantised.distilled } : {}),
    loss_before, loss_after: lossAfter,
    perplexity_before: Math.exp(loss_before), perplexity_after: Math.exp(lossAfter),
  };
}

function render(
  { reports, excluded, distilled }: Quantised,
    summary: ReturnType<typeof summarise> & { evaluated_on: string },
  c: ReturnType<typeof colours>,
): string {
  const percent = (x: number | null) => (x === null ? "" : `${(100 * x).toFixed(2)} %`);
  const rows = mergeExperts(reports).map((r) =>
    [` ${r.module}`, r.format, percent(r.weight_error), percent(r.output_error)]);
  const { perplexity_before: before, perplexity_after: after } = summary;
  return [
    table([[c.bold(" Layer"), c.bold("format"), c.bold("weights lose"), c.bold("outputs lose")], ...rows],
      { align: ["left", "left", "right", "right"] }),
    "",
    `${reports.length} matrices quantised, ${excluded.length} left as they are`,
    `${summary.bits_per_quantised_weight.toFixed(3)} bits per weight of those, ` +
    `${summary.bits_per_weight.toFixed(3)} of the whole checkpoint: ` +
    `${formatBytes(summary.bytes)}, ${summary.bytes_per_weight.toFixed(4)} bytes per weight`,
    ...(distilled ? [
      `divergence from the model's predictions ${distilled.before.toFixed(6)} nats before distillation, ` +
      `${distilled.after.toFixed(6)} after`,
    ] : []),
    `perplexity ${before.toFixed(4)} before, ${after.toFixed(4)} after ` +
    `(${percent(after / before - 1)}), on ${summary.evaluated_on}`, "",
  ].join("\n");
}

/** One line for all experts of a layer: the root mean squares of their errors. */
function mergeExperts(reports: readonly ModuleReport[]): ModuleReport[] {
  const groups = new Map<string, ModuleReport[]>();
  for (const report of reports) {
    const name = report.module.replace(/\.experts\.\d+\./, ".experts.*.");
    groups.set(name, [...groups.get(name) ?? [], report]);
  }
  const rms = (list: readonly number[]) => Math.sqrt(list.reduce((sum, x) => sum + x * x, 0) / list.length);
  return [...groups].map(([name, list]) => ({
    module: list.length > 1 ? `${name} (${formatCount(list.length)})` : name, format: list[0]!.format,
    weight_error: rms(list.map(({ weight_error }) => weight_error)),
    output_error: list.some(({ output_error }) => output_error === null) ? null
      : rms(list.map(({ output_error }) => output_error!)),
  }));
}
