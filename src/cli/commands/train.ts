import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openCheckpoint } from "../../io/checkpoint_files.ts";
import { localFileLayer } from "../../io/files.node.ts";
import { parseConfig, type NemotronHConfig } from "../../models/config.ts";
import { countParameters, memoryToTrain, trainingBytes } from "../../models/accounting.ts";
import { DROP_POLICIES } from "../../ops/moe_limit.ts";
import { openRankDevices, RANKS_ON, type RanksOn } from "../../parallel/rank_devices.ts";
import { checkLayout, formatLayout, type Layout, worldOf } from "../../parallel/layout.ts";
import { ROUTER_DTYPES, ROUTINGS, WEIGHINGS } from "../../nn/moe_training.ts";
import { OFFLOADED_MODULES } from "../../nn/offload.ts";
import { RECOMPUTED_MODULES } from "../../nn/recompute.ts";
import { RECIPE_NAMES, RECIPES } from "../../precision/recipes.ts";
import { KraitError, UsageError } from "../../tensor/errors.ts";
import { readSavedRun } from "../../train/checkpoint.ts";
import { splitDocuments } from "../../train/data.ts";
import { readDocuments } from "../../train/data.node.ts";
import { formatMetric } from "../../train/metrics.ts";
import { BIAS_UPDATES, makeRecipe, RECIPE, type Recipe } from "../../train/recipe.ts";
import type { TrainingRun } from "../../train/run.ts";
import {
  collectiveLog, type CollectiveSum, type RankTime, type StepTrace, sumCollectives,
} from "../../train/trace.ts";
import { defineCommand } from "../args.ts";
import { collectiveTable } from "../collective_table.ts";
import { givenLayout } from "../given_layout.ts";
import { findConfig, findTokenizer, modelFolder } from "../models.ts";
import { Progress } from "../progress.ts";
import { colours, formatBytes, formatCount, wantsColour } from "../terminal.ts";
import { bytesOn, runTraining } from "../training.ts";

export const train = defineCommand({
  name: "train",
  summary: "Train a model on text.",
  description:
    "Documents are packed into rows with the recurrent state and attention reset at every document's " +
    "start. Checkpoints have the published layout plus optimiser state; an interrupt saves one, and " +
    "--resume continues as if nothing had happened. Training goes on when nobody reads standard error any " +
    "more; when nobody reads standard output, it ends as by an interrupt.",
  savesWhenLeft: true,
  options: {
    config: {
      type: "string", value: "PRESET|FILE",
      help: "A preset's name, a config.json or a model folder, for a model with random weights (tiny).",
    },
    init: {
      type: "string", value: "DIR",
      help: "Start a new run from the weights, config and tokenizer of a checkpoint folder or another run.",
    },
    data: {
      type: "string", value: "PATH", multiple: true,
      help: "Text files, .jsonl files with a text field, or folders of them.",
    },
    out: {
      type: "string", value: "DIR", required: true,
      help: "Folder for checkpoints, metrics.jsonl and loss.svg.",
    },
    steps: { type: "integer", min: 1, help: "Optimiser updates (300)." },
    seed: { type: "integer", min: 0, help: "Decides the initial weights and the order of the data (0)." },
    batch: { type: "integer", min: 1, help: "Rows per micro-batch (8)." },
    seqlen: { type: "integer", min: 2, help: "Tokens per row (128)." },
    accumulate: {
      type: "integer", min: 1,
      help: "Micro-batches per update, those of all replicas (1; dp * pp of a layout).",
    },
    perToken: {
      type: "boolean", help: "Every scored token counts alike; otherwise every micro-batch does.",
    },
    layout: {
      type: "string", value: "TEXT",
      help: "Ranks to train on, such as tp=2,dp=2 (see krait layout). A resumed run may go on under another.",
    },
    ranksOn: {
      type: "string", choices: RANKS_ON, default: "shared",
      help: "Where ranks lie: on one GPU device together, on a device each, or on all adapters in turn.",
    },
    distributedOptimizer: {
      type: "string", choices: ["on", "off"], default: "on",
      help: "Whether replicas divide the optimiser's state among them; the results are the same.",
    },
    bucketSize: {
      type: "integer", min: 1,
      help: "Parameters whose gradients ranks sum in one go (as many as a binding holds, 32M in f32).",
    },
    lr: { type: "number", min: 0, help: "Peak learning rate." },
    minLr: { type: "number", min: 0, help: "Learning rate at the end (lr / 100)." },
    schedule: {
      type: "string", choices: ["wsd", "cosine", "constant"], help: "Shape of the learning rate (wsd).",
    },
    warmup: { type: "integer", min: 0, help: "Steps of linear warm-up (a fifteenth of the run)." },
    decay: { type: "integer", min: 0, help: "Steps of the final decay of wsd (a third of the run)." },
    weightDecay: { type: "number", min: 0, help: "Decoupled weight decay of matrices (0.1)." },
    clip: { type: "number", min: 0, help: "Largest gradient norm (1)." },
    mtpDepths: { type: "integer", min: 0, help: "Tokens beyond the next that the MTP head learns (1)." },
    mtpScale: { type: "number", min: 0, help: "Weight of the MTP loss (0.3)." },
    auxCoeff: {
      type: "number", min: 0, help: "Coefficient of the balancing loss of each sequence (1e-4).",
    },
    auxLoss: { type: "number", min: 0, help: "Coefficient of the balancing loss of a micro-batch (0)." },
    globalAuxLoss: {
      type: "number", min: 0,
      help: "Coefficient of the balancing loss of a step, whose micro-batches add their counts (0).",
    },
    zLoss: { type: "number", min: 0, help: "Coefficient of the loss that keeps router logits small (0)." },
    biasRate: { type: "number", min: 0, help: "Step of the experts' correction biases (1e-3)." },
    biasUpdate: {
      type: "string", choices: BIAS_UPDATES,
      help: "They go that far up or down (sign), or that share of the way to an even choice (sign).",
    },
    capacityFactor: {
      type: "number", min: 0,
      help: "Rows of an expert over its even share; tokens beyond skip it. 0: none does (0).",
    },
    dropPolicy: {
      type: "string", choices: DROP_POLICIES,
      help: "Who keeps the expert: the largest weights (probs), or the first tokens (probs).",
    },
    padToCapacity: { type: "boolean", help: "Give every expert rows for its whole capacity." },
    align: { type: "integer", min: 1, help: "Fill the rows of every expert up to a multiple of N (1)." },
    weighing: {
      type: "string", choices: WEIGHINGS,
      help: "Where the weights of experts come in: with outputs, or behind the activation (output).",
    },
    routerJitter: {
      type: "number", min: 0, help: "Multiply the router's input by random numbers of 1 - N to 1 + N (0).",
    },
    routerDtype: {
      type: "string", choices: ROUTER_DTYPES, help: "What the router's product rounds to (f32).",
    },
    routing: {
      type: "string", choices: ROUTINGS,
      help: "Choose experts by their scores, or by scores balanced over a micro-batch (topk).",
    },
    forcedBalance: {
      type: "boolean", help: "Choose experts at random, for measuring speed: nothing useful is learnt.",
    },
    weights: {
      type: "string", choices: ["f32", "bf16"], help: "How matrices are stored; all else is f32 (f32).",
    },
    master: {
      type: "string", choices: ["f32", "none"],
      help: "Masters of bf16 weights: f32, or none and updates rounded at random (f32).",
    },
    moments: {
      type: "string", choices: ["f32", "bf16", "8bit"],
      help: "How both moments of AdamW are stored: 8, 4 or 2.125 bytes per parameter, the last on one rank " +
        "(f32).",
    },
    maxSkipped: {
      type: "integer", min: 1,
      help: "Steps in a row without a finite loss that end the run; each is skipped (5).",
    },
    precision: {
      type: "string", choices: RECIPE_NAMES,
      help: "Formats of the factors of products (f32).",
    },
    without: {
      type: "string", value: "NAMES",
      help: "Ingredients of the precision to leave out, by commas: for nvfp4 " +
        `${Object.keys(RECIPES.nvfp4.ingredients).join(", ")}.`,
    },
    recompute: {
      type: "string", value: "WHAT", alone: "full",
      help: "Less memory, longer steps: what runs a second time for its gradients, which stay the same. " +
        "Every layer (full), every N layers as one (full:N), the first N of a stage (block:N), nothing " +
        `(off), or of ${RECOMPUTED_MODULES.join(", ")} those named, by commas.`,
    },
    offload: {
      type: "string", value: "WHAT", alone: "activations,optimizer",
      help: "Less memory on the GPU, longer steps: what lies in host memory between its uses, by commas: " +
        "moments and masters (optimizer), what layers keep for their gradients (activations, or some of " +
        `${OFFLOADED_MODULES.join(", ")} as in activations=mamba+moe), nothing (off). Changes no bit.`,
    },
    evalEvery: {
      type: "integer", min: 0, default: 0, help: "Steps between evaluations; 0: only at the end.",
    },
    evalRows: { type: "integer", min: 0, help: "Validation rows per evaluation; 0: all (0)." },
    saveEvery: {
      type: "integer", min: 0, default: 100, help: "Steps between checkpoints; 0: only at the end.",
    },
    keep: { type: "integer", min: 1, default: 2, help: "Checkpoints to keep." },
    tokenizer: { type: "string", value: "FILE", help: "A tokenizer.json; default: bytes." },
    resume: { type: "boolean", help: "Continue from the newest checkpoint in --out." },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    trace: {
      type: "string", value: "FILE",
      help: "Write a Chrome trace of one step (opens in Perfetto): every rank's ops, kernels, collectives " +
        "and waiting.",
    },
    logCollectives: {
      type: "string", value: "FILE",
      help: "Write the collectives of one step, a JSON line each: kind, group, ranks, bytes sent, time.",
    },
    json: { type: "boolean", help: "Print one JSON line per step to standard output." },
  },
  examples: [
    "krait train --config tiny --data corpus/ --out runs/first --steps 300",
    "krait train --out runs/first --data corpus/ --resume",
    "krait train --init upcycled --data corpus/ --out runs/upcycled --layout dp=2,ep=2",
  ],
  async run({ options, stdout, stderr, env, signal }) {
    if (options.data.length === 0) {
      throw new UsageError("No training data was given: name at least one --data PATH.");
    }
    const c = colours(wantsColour(stderr, env));
    const { config, recipe, layout, init, tokenizerFolder, doneBefore } = await plan(options);
    if (recipe.accumulate % layout.dp !== 0) {
      throw new UsageError(
        `--accumulate must be a multiple of the layout's dp = ${layout.dp}, found ${recipe.accumulate}.`);
    }
    checkLayout(layout, config, { ...recipe, micro_batches: recipe.accumulate / layout.dp });
    const { tokenizer, files } = findTokenizer(options.tokenizer ?? tokenizerFolder, config.vocab_size);
    const split = splitDocuments(readDocuments(options.data), { seed: recipe.seed });
    const devices = await openRankDevices(worldOf(layout), options.ranksOn as RanksOn, options.adapter);
    const device = devices[0]!;
    const isSolo = worldOf(layout) === 1;
    const { trace: traceFile, logCollectives: logFile } = options;
    let measured: CollectiveSum[] | null = null;
    const progress = new Progress({
      total: recipe.steps, start: doneBefore, silent: options.json, stream: stderr, env,
    });
    const say = (text: string) => {
      if (!options.json) progress.log(text);
    };
    try {
      const result = await runTraining({
        devices, layout, config, recipe, split, tokenizer,
        out: options.out, init, resume: options.resume, zero: options.distributedOptimizer === "on",
        bucketSize: options.bucketSize,
        saveEvery: options.saveEvery, keep: options.keep, signal,
        tokenizerFiles: files,
        onStart(run, { unigram, bigram, trigram }) {
          const { total, active } = countParameters(config);
          say(
            `${c.bold("Krait")} trains ${formatCount(total)} parameters (${formatCount(active)} active) on ` +
            `${device.info.name}${worldOf(layout) > 1
              ? `, on ${worldOf(layout)} ranks: ${formatLayout(layout)}` : ""}`);
          const { weights, gradients, optimizer } = memoryToTrain(config, 0, recipe);
          const masters = recipe.master === "f32" ? " with f32 masters" : " without masters";
          say(
            `weights ${recipe.weights}${recipe.weights === "f32" ? "" : masters}, ` +
            `moments ${recipe.moments}: ` +
            `${trainingBytes(recipe).total} bytes per parameter of a matrix with its f32 gradient, ` +
            `${formatBytes(weights + gradients + optimizer)} in all`);
          say(`${formatCount(run.packer.corpus.tokens.length)} tokens, ` +
            `${formatCount(run.validation.tokens.length)} to validate; ` +
            `seed ${recipe.seed}, data ${run.packer.fingerprint}, deterministic on this adapter`);
          say(`n-gram models on the same text, bits per byte: unigram ${unigram.bitsPerByte.toFixed(3)}, ` +
            `bigram ${bigram.bitsPerByte.toFixed(3)}, trigram ${trigram.bitsPerByte.toFixed(3)}`);
        },
        onStep(step) {
          if (options.json) {
            stdout.write(formatMetric({ ...step, live_bytes: bytesOn(devices, "liveBytes") }));
          }
          const { loss, grad_norm, skipped_steps } = step;
          if (step.skipped) {
            say(`step ${step.step + 1}: skipped, with a loss of ${loss} and a gradient norm of ${grad_norm}`);
          }
          progress.update({
            step: step.step + 1, loss, tokensPerSecond: step.tokens_per_s,
            note: skipped_steps > 0 ? `${skipped_steps} skipped` : undefined,
          });
        },
        ...(traceFile || logFile ? {
          onTrace(trace: StepTrace, { mesh }: TrainingRun, step: number) {
            const { collectives } = trace;
            measured = sumCollectives(collectives);
            if (traceFile) writeFileSync(traceFile, trace.chromeTrace(mesh));
            if (logFile) writeFileSync(logFile, collectiveLog(step, collectives));
            if (isSolo) return;
            const share = (of: (time: RankTime) => number) => trace.times.map((time) =>
              `${Math.round(100 * of(time) / trace.length)}`).join(" ");
            say(`one step on the ranks' clocks: ${trace.length.toFixed(1)} ms; ` +
              `per rank, in percent: compute ${share(({ compute }) => compute)}, communication ` +
              `${share(({ communication }) => communication)}, waiting ${share(({ idle }) => idle)}`);
          },
        } : {}),
        onEvaluation(step, { loss, bits_per_byte }) {
          if (options.json) {
            stdout.write(`${JSON.stringify({ step, val_loss: loss, val_bits_per_byte: bits_per_byte })}\n`);
          } else {
            progress.log(
              `step ${step}: validation loss ${loss.toFixed(4)}, ${bits_per_byte.toFixed(3)} bits per byte`);
          }
        },
      });
      progress.done();
      const sums = measured ?? sumCollectives(result.run.trainer.collectives);
      if (options.json) {
        if (sums.length > 0) stdout.write(`${JSON.stringify({ collectives: sums })}\n`);
      } else if (sums.length > 0) {
        say(`between ranks in ${measured ? "one" : "each"} step:\n${collectiveTable(sums)}`);
      }
      say(
        `checkpoint ${result.checkpoint}; peak memory ${formatBytes(bytesOn(devices, "peakBytes"))}; curve ` +
        `${join(options.out, "loss.svg")}`);
      return result.interrupted ? 130 : 0;
    } finally {
      for (const one of new Set(devices)) one.destroy();
    }
  },
});

type GivenRecipe = { readonly [key in keyof Recipe]?: Recipe[key] | undefined };

interface Plan {
  readonly config: NemotronHConfig;
  readonly recipe: Recipe;
  readonly layout: Layout;
  /** Whose weights a new run starts from. */
  readonly init: string | null;
  /** Where the tokenizer of the checkpoint lies. */
  readonly tokenizerFolder: string | null;
  /** Updates that the resumed run has behind it. */
  readonly doneBefore: number;
}

/** Config and recipe: of the resumed run, whose own values stand, or of the command line. */
async function plan(options: {
  readonly config: string | undefined; readonly init: string | undefined;
  readonly out: string; readonly resume: boolean; readonly steps: number | undefined;
  readonly seed: number | undefined; readonly batch: number | undefined; readonly seqlen: number | undefined;
  readonly accumulate: number | undefined; readonly lr: number | undefined;
  readonly minLr: number | undefined; readonly schedule: Recipe["schedule"] | undefined;
  readonly warmup: number | undefined; readonly decay: number | undefined;
  readonly weightDecay: number | undefined; readonly clip: number | undefined;
  readonly mtpDepths: number | undefined; readonly mtpScale: number | undefined;
  readonly auxCoeff: number | undefined; readonly biasRate: number | undefined;
  readonly auxLoss: number | undefined; readonly globalAuxLoss: number | undefined;
  readonly zLoss: number | undefined; readonly capacityFactor: number | undefined;
  readonly dropPolicy: Recipe["drop_policy"] | undefined; readonly padToCapacity: boolean;
  readonly biasUpdate: Recipe["bias_update"] | undefined; readonly align: number | undefined;
  readonly weighing: Recipe["weighing"] | undefined; readonly routerJitter: number | undefined;
  readonly routerDtype: Recipe["router_dtype"] | undefined; readonly routing: Recipe["routing"] | undefined;
  readonly forcedBalance: boolean;
  readonly weights: Recipe["weights"] | undefined; readonly master: Recipe["master"] | undefined;
  readonly moments: Recipe["moments"] | undefined;
  readonly recompute: string | undefined; readonly offload: string | undefined;
  readonly maxSkipped: number | undefined;
  readonly precision: string | undefined; readonly without: string | undefined;
  readonly evalEvery: number; readonly evalRows: number | undefined;
  readonly layout: string | undefined; readonly perToken: boolean;
}): Promise<Plan> {
  for (const other of ["config", "resume"] as const) {
    if (options.init !== undefined && options[other]) {
      throw new UsageError(
        `--init starts a new run from a checkpoint and its config, and cannot stand beside --${other}.`);
    }
  }
  const layoutOf = (text: string | undefined) => givenLayout(text ?? "tp=1");
  const given: GivenRecipe = {
    steps: options.steps, seed: options.seed, batch: options.batch, seqlen: options.seqlen,
    accumulate: options.accumulate, per_token: options.perToken || undefined,
    lr: options.lr, min_lr: options.minLr,
    schedule: options.schedule, warmup: options.warmup, decay: options.decay,
    weight_decay: options.weightDecay, clip: options.clip,
    mtp_depths: options.mtpDepths, mtp_scale: options.mtpScale,
    aux_coeff: options.auxCoeff, aux_loss: options.auxLoss, global_aux_loss: options.globalAuxLoss,
    z_loss: options.zLoss, capacity_factor: options.capacityFactor, drop_policy: options.dropPolicy,
    pad_to_capacity: options.padToCapacity || undefined, align: options.align,
    bias_rate: options.biasRate, bias_update: options.biasUpdate,
    router_jitter: options.routerJitter, router_dtype: options.routerDtype, routing: options.routing,
    forced_balance: options.forcedBalance || undefined, weighing: options.weighing,
    recompute: options.recompute, offload: options.offload,
    precision: options.precision, without: options.without,
    weights: options.weights, master: options.master, moments: options.moments,
    max_skipped: options.maxSkipped, eval_rows: options.evalRows, eval_every: options.evalEvery,
  };
  if (!options.resume) {
    const layout = layoutOf(options.layout);
    const init = options.init === undefined ? null : modelFolder(options.init);
    return {
      config: findConfig(init ?? options.config ?? "tiny"), layout, init, tokenizerFolder: init,
      doneBefore: 0,
      recipe: makeRecipe({ ...given, accumulate: options.accumulate ?? layout.dp * layout.pp }),
    };
  }
  const checkpoint = await openCheckpoint(localFileLayer(), options.out);
  if (!checkpoint) throw new KraitError(`There is no checkpoint in ${options.out} to resume from.`);
  const saved = await readSavedRun(checkpoint);
  const doneBefore = saved.steps;
  const recipe = makeRecipe(saved.recipe); // older runs lack newer fields
  // what may change without making another run of it
  const free = new Set(["steps", "eval_every", "eval_rows", "recompute", "offload", "max_skipped"]);
  for (const [key, value] of Object.entries(given)) {
    const before = recipe[key as keyof Recipe] ?? RECIPE[key as keyof Recipe]; // older runs lack some
    if (value !== undefined && value !== before && !free.has(key)) {
      throw new UsageError(
        `The run in ${options.out} has ${key} ${before}, and --resume cannot change it to ${value}.`);
    }
  }
  const steps = options.steps ?? recipe.steps;
  // A longer run plans its decay anew.
  const rest = steps === recipe.steps ? recipe : { ...recipe, decay: Math.floor(steps / 3) };
  return {
    config: parseConfig(readFileSync(join(checkpoint.path, "config.json"))),
    recipe: makeRecipe({
      ...rest, steps, eval_every: options.evalEvery, eval_rows: options.evalRows ?? recipe.eval_rows,
      recompute: options.recompute ?? recipe.recompute, offload: options.offload ?? recipe.offload,
      max_skipped: options.maxSkipped ?? rest.max_skipped,
    }),
    layout: layoutOf(options.layout ?? saved.layout), init: null, tokenizerFolder: checkpoint.path,
    doneBefore,
  };
}
