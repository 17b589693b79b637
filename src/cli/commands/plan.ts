import { statSync } from "node:fs";
import { EFFICIENCIES, gpuNamed, gpuNames, PLAN_PRECISIONS } from "../../parallel/hardware.ts";
import { formatLayout } from "../../parallel/layout.ts";
import { shapeOf, shapeParameters } from "../../parallel/model_shape.ts";
import type { ModelShape } from "../../parallel/model_shape.ts";
import { losesBy, searchPlans, stageText, USABLE_MEMORY } from "../../parallel/plan.ts";
import type { Plan, PlanRequest, PlanResult } from "../../parallel/plan.ts";
import { STEP_PARTS } from "../../parallel/cost.ts";
import { LEFT_OUT, namedShape, shapeNames } from "../../parallel/published.ts";
import { validate } from "../../parallel/validate.ts";
import type { Prediction, Validation } from "../../parallel/validate.ts";
import { UsageError } from "../../tensor/errors.ts";
import { defineCommand } from "../args.ts";
import { givenLayout } from "../given_layout.ts";
import { findConfig } from "../models.ts";
import { colours, formatCount, formatDuration, table, wantsColour } from "../terminal.ts";

export const plan = defineCommand({
  name: "plan",
  summary: "Search the parallel layouts of a model on many GPUs.",
  description:
    "Predicts step time and memory of every layout that fits, from data sheets, published kernel rates and a "
    + "few calibrated efficiencies, and shows the fastest. --validate sets its predictions beside published "
    + "rates.",
  options: {
    model: {
      type: "string", value: "MODEL",
      help: "A published model (nemotron-3-super, deepseek-v3, ...), a preset, config.json or model folder.",
    },
    gpus: { type: "integer", min: 1, max: 2 ** 20, help: "Number of GPUs." },
    gpu: { type: "string", default: "h100", help: `One of ${gpuNames().join(", ")}.` },
    precision: { type: "string", choices: PLAN_PRECISIONS, default: "bf16", help: "Format of the products." },
    seqlen: { type: "integer", min: 1, max: 2 ** 24, default: 8192, help: "Tokens in a sequence." },
    globalBatch: {
      type: "integer", min: 1, max: 2 ** 24,
      help: "Sequences in a step; default: two for each GPU, at least 256.",
    },
    layout: { type: "string", help: "Only this layout, as krait train has it: tp=2,pp=4,ep=8." },
    top: { type: "integer", min: 1, max: 1000, default: 10, help: "Layouts to show." },
    validate: { type: "boolean", help: "Compare with published rates instead." },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: [
    "krait plan --model nemotron-3-super --gpus 1024 --gpu h100",
    "krait plan --model deepseek-v3 --gpus 256 --gpu gb200 --precision mxfp8 --seqlen 4096 --top 5",
    "krait plan --validate",
  ],
  run({ options, stdout, env }) {
    const c = colours(wantsColour(stdout, env));
    if (options.validate) {
      const result = validate();
      stdout.write(options.json ? `${JSON.stringify(validationFacts(result), null, 2)}\n`
        : renderValidation(result, c));
      return;
    }
    const { model, gpus } = options;
    if (model === undefined) throw new UsageError("The option --model is required.");
    if (gpus === undefined) throw new UsageError("The option --gpus is required.");
    const request: PlanRequest = {
      shape: findShape(model), gpus, gpu: gpuNamed(options.gpu), precision: options.precision,
      seqlen: options.seqlen, globalBatch: options.globalBatch ?? gpus * Math.max(2, Math.ceil(256 / gpus)),
      top: options.top, ...(options.layout === undefined ? {} : { fixed: axesOf(options.layout, gpus) }),
    };
    const result = searchPlans(request);
    stdout.write(options.json ? `${JSON.stringify(planFacts(request, result), null, 2)}\n`
      : renderPlans(request, result, c));
  },
});

function findShape(name: string): ModelShape {
  const named = namedShape(name);
  if (named) return named;
  if (statSync(name, { throwIfNoEntry: false })) return shapeOf(findConfig(name), name);
  throw new UsageError(
    `"${name}" is neither a known model (${shapeNames().join(", ")}) nor an existing file or folder.`);
}

function axesOf(text: string, gpus: number): NonNullable<PlanRequest["fixed"]> {
  const { tp, cp, pp, ep, etp, vpp } = givenLayout(text, gpus);
  return { tp, cp, pp, ep, etp, vpp };
}

/** Names of the parts of a step for people. */
const PART_NAMES: Readonly<Record<(typeof STEP_PARTS)[number], string>> = {
  products: "products", mixing: "attention and scans", memory: "memory-bound kernels",
  tp: "tensor-parallel collectives", cp: "context-parallel exchange", ep: "expert exchange",
  recompute: "recomputation", imbalance: "uneven stages", bubble: "pipeline bubble", pp: "stage messages",
  dp: "gradients and parameters", optimizer: "optimiser",
};

function planFacts(request: PlanRequest, result: PlanResult) {
  const { shape, gpus, gpu, precision, seqlen, globalBatch } = request;
  const best = result.plans[0]!;
  return {
    model: shape.name, parameters: shapeParameters(shape), gpus, gpu: gpu.name, precision, seqlen,
    global_batch: globalBatch, memory: gpu.memory, usable_memory: USABLE_MEMORY * gpu.memory,
    searched: result.searched, refused: Object.fromEntries(result.refused),
    plans: result.plans.map((each) => ({
      ...oneFact(each, shape), loses_by: losesBy(each, best).map(({ part, share }) => ({ part, share })),
    })),
    sources: { gpu: gpu.source, efficiencies: EFFICIENCIES },
  };
}

function oneFact(each: Plan, shape: ModelShape) {
  return {
    layout: formatLayout(each.layout), stages: stageText(each, shape),
    micro_batch: each.sizes.batch, micro_batches: each.sizes.micro_batches,
    recompute: each.recompute, fsdp: each.fsdp, overlap_exchange: each.overlapExchange, mfu: each.mfu,
    tflops: each.tflops, tokens_per_second: each.tokens, step_seconds: each.step.total, step: each.step,
    memory: each.memory,
  };
}

const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
const percent = (share: number, digits = 1) => `${(100 * share).toFixed(digits)} %`;

function renderPlans(
  request: PlanRequest, { plans, searched, refused }: PlanResult, c: ReturnType<typeof colours>,
): string {
  const { shape, gpus, gpu, precision, seqlen, globalBatch } = request;
  const best = plans[0]!;
  const { activations, ...memory } = best.memory;
  const kept = Object.entries(activations).filter(([, bytes]) => bytes > 0);
  const losers = plans.slice(1).map((each, i) => [
    ` ${i + 2}`, `+${percent(each.step.total / best.step.total - 1)}`,
    losesBy(each, best).slice(0, 3)
      .map(({ part, share }) => `${PART_NAMES[part]} ${percent(share)}`).join(", "),
  ]);
  return [
    `${c.bold(shape.name)}, ${formatCount(shapeParameters(shape))} parameters, on ${gpus} x ${gpu.name} in `
    + `${precision}: ${globalBatch} sequences of ${seqlen} tokens a step`, "",
    table([
      ["", "layout", "batch", "recompute", "step", "MFU", "TFLOPS", "tokens/s", "memory"].map(c.bold),
      ...plans.map((each, i) => [
        ` ${i + 1}`, `${formatLayout(each.layout)}${each.fsdp ? " FSDP" : ""}`,
        `${each.sizes.micro_batches} x ${each.sizes.batch}`, each.recompute, formatDuration(each.step.total),
        percent(each.mfu), each.tflops.toFixed(0), formatCount(Math.round(each.tokens)),
        gigabytes(each.memory.total),
      ]),
    ]),
    ...(best.layout.pp > 1 ? ["", `${c.bold("Stages of the first:")} ${stageText(best, shape)}`] : []),
    "", c.bold("Where a step of the first goes"),
    table(STEP_PARTS.filter((part) => best.step[part] > 0).map((part) => [
      ` ${PART_NAMES[part]}`, formatDuration(best.step[part]), percent(best.step[part] / best.step.total),
    ])),
    "", c.bold(`Memory of its fullest GPU, of ${gigabytes(gpu.memory)}`),
    table([
      [" parameters", gigabytes(memory.parameters)], [" gradients", gigabytes(memory.gradients)],
      [" optimiser", gigabytes(memory.optimizer)],
      ...kept.map(([kind, bytes]) => [` activations, ${kind}`, gigabytes(bytes)]),
      [" buffers", gigabytes(memory.buffers)], [" total", gigabytes(memory.total)],
    ]),
    ...(losers.length === 0 ? [] : ["", c.bold("Why the others lose"), table(losers)]),
    "", `Searched ${searched} combinations of layout, micro-batch and recomputation. Refused:`,
    ...[...refused].map(([rule, count]) => ` ${count}: ${rule}`), "",
  ].join("\n");
}

function validationFacts({ predictions, orders, errors }: Validation) {
  return {
    runs: predictions.map(({ run, plan: found, mfu, error, flopsError }) => ({
      ...run, published_mfu: mfu, predicted: found && oneFact(found, namedShape(run.model)!),
      error, flops_error: flopsError,
    })),
    orders, errors, efficiencies: EFFICIENCIES, left_out: LEFT_OUT,
  };
}

function renderValidation(
  { predictions, orders, errors }: Validation, c: ReturnType<typeof colours>,
): string {
  const signed = (share: number, digits = 0) => `${share > 0 ? "+" : ""}${percent(share, digits)}`;
  const row = ({ run, plan: found, mfu, error }: Prediction) => [
    ` ${run.table}`, run.model, `${run.gpus} x ${run.gpu}`, run.precision, run.method, String(run.seqlen),
    run.tflops === null ? "no memory" : run.tflops.toFixed(0), mfu === null ? "" : percent(mfu),
    found ? found.tflops.toFixed(0) : "no memory", found ? percent(found.mfu) : "",
    error === null ? "" : signed(error),
  ];
  const flops = predictions.filter(({ flopsError }) => flopsError !== null);
  return [
    c.bold("Published and predicted TFLOPS per GPU"),
    table([
      [" table", "model", "GPUs", "precision", "method", "tokens", "published", "MFU", "predicted", "MFU",
        "error"].map(c.bold),
      ...predictions.map(row),
    ]),
    "", c.bold("Errors"),
    table([
      [" table", "runs", "median", "mean", "worst"].map(c.bold),
      ...errors.map((each) => [
        ` ${each.table}`, String(each.runs), percent(each.median), signed(each.mean, 1), percent(each.worst),
      ]),
    ]),
    "", c.bold("Orders, slowest first"),
    ...orders.map(({ what, published, predicted, agrees }) =>
      ` ${agrees ? "same" : c.red("differs")}  ${what}: ${published.join(" < ")}`
      + (agrees ? "" : `; predicted ${predicted.join(" < ")}`)),
    "", c.bold("Operations per token as counted here, over those that published TFLOPS and tokens imply"),
    table(flops.map(({ run, flopsError }) => [
      ` ${run.model}`, `${run.gpus} x ${run.gpu}`, run.precision, String(run.seqlen), signed(flopsError!, 1),
    ])),
    "", c.bold("Efficiencies, the same for all rows"),
    table(Object.entries(EFFICIENCIES).map(([name, value]) => [` ${name}`, String(value)])),
    "", c.bold("Left out"), ...LEFT_OUT.map((line) => ` ${line}`), "",
  ].join("\n");
}
