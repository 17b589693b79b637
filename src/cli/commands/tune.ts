import { environment } from "../../gpu/adapters.ts";
import { rehearse } from "../../infer/rehearse.ts";
import { type Decision, tune as measure } from "../../kernel/tune.ts";
import { TunerCache } from "../../kernel/tuner_cache.ts";
import { openDevice } from "../../tensor/device.ts";
import { UsageError } from "../../tensor/errors.ts";
import { defineCommand } from "../args.ts";
import { findConfig } from "../models.ts";
import { Progress } from "../progress.ts";
import { colours, formatDuration, table, wantsColour } from "../terminal.ts";

export const tune = defineCommand({
  name: "tune",
  summary: "Measure which kernels are fastest on an adapter, and keep the result.",
  description: `
    Where several kernels compute the same, Krait runs a default that suits the kind of adapter. This command
    measures the alternatives for the shapes of a model's training and generation, and keeps the fastest in
    the cache folder (KRAIT_CACHE, or krait in the user's cache). Devices opened later use them;
    KRAIT_TUNER=off ignores them. Results stay within the rounding of the default's, but are not its bits.

    An interrupted or too short run goes on where it stopped. A new driver or build starts over.`,
  options: {
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    config: {
      type: "string", value: "PRESET|FILE", default: "tiny", help: "The model whose shapes are measured.",
    },
    batch: { type: "integer", min: 1, help: "Rows per micro-batch of its training; default as in train." },
    seqlen: { type: "integer", min: 1, help: "Positions per row; default as in train." },
    prompt: { type: "integer", min: 1, default: 256, help: "Tokens of a prompt." },
    budget: { type: "string", value: "TIME", default: "10s",
      help: "Time to measure for, such as 500ms, 10s, 2min." },
    reset: { type: "boolean", help: "Forget earlier measurements of this adapter first." },
    json: { type: "boolean", help: "Print one JSON object instead of the table." },
  },
  examples: ["krait tune", "krait tune --adapter swiftshader --budget 60s", "krait tune --reset --budget 0s"],
  async run({ options, stdout, stderr, env, signal }) {
    const budgetMs = parseTime(options.budget);
    if (environment("KRAIT_TUNER") === "off") {
      throw new UsageError("The tuner is switched off by KRAIT_TUNER=off.");
    }
    const config = findConfig(options.config);
    const open = () => openDevice({ ...(options.adapter ? { adapter: options.adapter } : {}),
      tuning: false });
    const sketch = await open();
    const cache = new TunerCache(sketch);
    const { info } = sketch;
    if (options.reset) await cache.clear();
    await rehearse(sketch, config, {
      recipe: { batch: options.batch, seqlen: options.seqlen }, promptTokens: options.prompt,
    });
    const classes = sketch.choices.wanted();
    sketch.destroy();

    const known = await cache.load();
    const name = (d: { tunable: string; class: string }) => `${d.tunable} ${d.class}`;
    const done = new Map(known.map((decision) => [name(decision), decision]));
    const total = classes.filter((each) => (done.get(name(each))?.choice ?? null) === null).length;
    const progress = new Progress({ total, label: "class", silent: options.json || total === 0,
      stream: stderr, env });
    let finished = 0;
    const start = performance.now();
    await measure({
      open, classes, budgetMs, known, signal,
      onProgress: ({ tunable, class: text, candidate }) =>
        progress.update({ step: finished, note: `${tunable} ${text}: ${candidate}` }),
      onDecision: async (decision) => {
        done.set(name(decision), decision);
        finished++;
        await cache.save(decision);
      },
    });
    const spentMs = performance.now() - start;
    progress.done("");
    const decisions = classes.flatMap((each) => done.get(name(each)) ?? []);
    const open_classes = classes.length - decisions.filter(({ choice }) => choice !== null).length;
    if (options.json) {
      stdout.write(`${JSON.stringify({
        adapter: info.id, driver: info.description, cache: cache.place, budget_ms: budgetMs,
          spent_ms: spentMs,
        classes: classes.length, undecided: open_classes, decisions,
      })}\n`);
      return;
    }
    const c = colours(wantsColour(stdout, env));
    stdout.write(`${c.bold(`On ${info.name} (${info.description})`)}\n`);
    const rows = decisions.map((d) => [
      d.tunable, d.class, candidatesText(d), d.choice === null ? c.dim("undecided")
        : d.choice === d.default ? d.choice : c.green(d.choice), c.dim(d.default),
    ]);
    if (rows.length > 0) {
      const head = ["tunable", "class", "candidates, ms", "choice", "default"].map(c.dim);
      stdout.write(`${table([head, ...rows], { indent: " " })}\n`);
    }
    const faster = decisions.filter((d) => d.choice !== null && d.choice !== d.default).length;
    stdout.write(
      `${classes.length - open_classes} of ${classes.length} shape classes of ${options.config} are ` +
      "decided, " +
      `${faster} for another kernel than the default; measured for ${formatDuration(spentMs / 1000)}.\n`);
    if (open_classes > 0) stdout.write("Run the command again to go on, or give it more --budget.\n");
    stdout.write(c.dim(`Kept in ${cache.place}\n`));
  },
});

/** "tile 1.20, quad 3.4 times as slow" */
function candidatesText({ ms, rejected }: Decision): string {
  return [
    ...Object.entries(ms).map(([name, value]) => `${name} ${value.toPrecision(3)}`),
    ...Object.entries(rejected).map(([name, reason]) => `${name} ${reason}`),
  ].join(", ") || "only one";
}

/** Milliseconds of "500ms", "10s", "2min" or a number of seconds. */
function parseTime(text: string): number {
  const [, number, unit = "s"] = /^(\d+(?:\.\d+)?)\s*(ms|s|min|m)?$/.exec(text) ?? [];
  if (number === undefined) throw new UsageError(
    `--budget must be a time such as 10s or 2min, found "${text}".`);
  return Number(number) * { ms: 1, s: 1000, m: 60_000, min: 60_000 }[unit as "ms"];
}
