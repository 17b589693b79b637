import { environment } from "../../gpu/adapters.ts";
import { rehearse } from "../../infer/rehearse.ts";
import { type Decision, tune as measure } from "../../kernel/tune.ts";
import { parseClass, type Shape } from "../../kernel/tuner.ts";
import { TunerCache } from "../../kernel/tuner_cache.ts";
import { openDevice } from "../../tensor/device.ts";
import { UsageError } from "../../tensor/errors.ts";
import { defineCommand } from "../args.ts";
import { findConfig } from "../models.ts";
import { Progress } from "../progress.ts";
import { type Colours, colours, formatDuration, table, visibleWidth, wantsColour } from "../terminal.ts";

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
      onProgress: ({ tunable, candidate }) =>
        progress.update({ step: finished, note: `${tunable}: ${candidate}` }),
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
    for (const tunable of new Set(decisions.map((d) => d.tunable))) {
      stdout.write(`${section(tunable, decisions.filter((d) => d.tunable === tunable), c)}\n`);
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

/** As wide as a terminal usually is. */
const COLUMNS = 80;

/** The decisions of one tunable: what its classes have in common above, a line for each below. */
function section(tunable: string, decisions: readonly Decision[], c: Colours): string {
  const shapes = decisions.map((d) => parseClass(d.class) ?? {});
  const isCommon = (field: string) =>
    shapes.length > 1 && shapes.every((shape) => shape[field] === shapes[0]![field]);
  const fields = (shape: Shape, wanted: (field: string) => boolean) => Object.entries(shape)
    .filter(([field, value]) => wanted(field) && value !== false)
    .map(([field, value]) => (value === true ? field : `${field}=${value}`)).join(" ");
  const rows = decisions.map((d, i) => {
    const { choice, ms, rejected } = d;
    const best = choice === null ? undefined : ms[choice];
    const named = (name: string) => (name === d.default && name !== choice ? `${name} (default)` : name);
    const others = [
      ...Object.entries(ms).filter(([name]) => name !== choice).map(([name, value]) => {
        const time = best === undefined ? `${value.toPrecision(3)} ms` : `${(value / best).toFixed(1)}x`;
        return `${named(name)} ${time}`;
      }),
      ...Object.entries(rejected).map(([name, reason]) =>
        `${named(name)} ${reason.replace(/^([\d.]+) times as slow$/, "$1x")}`),
    ];
    return [
      fields(shapes[i]!, (field) => !isCommon(field)),
      choice === null ? c.dim("undecided") : choice === d.default ? choice : c.green(choice),
      best === undefined ? "" : `${best.toPrecision(3)} ms`, c.dim(others.join(", ") || "alone"),
    ];
  });
  const head = ["class", "choice", "time", "others"].map(c.dim);
  const title = `${c.bold(tunable)} ${c.dim(fields(shapes[0]!, isCommon))}`.trimEnd();
  const all = [head, ...rows];
  const layout = { indent: " ", align: ["left", "left", "right", "left"] } as const;
  const whole = table(all, layout);
  if (whole.split("\n").every((line) => visibleWidth(line) <= COLUMNS)) {
    return `${title}\n${whole}`;
  }
  // Too wide for one line each: what else there was stands below.
  const short = table(all.map((row) => row.slice(0, 3)), layout).split("\n");
  return [title, ...all.flatMap((row, i) => [short[i]!, `   ${row[3]!}`])].join("\n");
}

/** Milliseconds of "500ms", "10s", "2min" or a number of seconds. */
function parseTime(text: string): number {
  const [, number, unit = "s"] = /^(\d+(?:\.\d+)?)\s*(ms|s|min|m)?$/.exec(text) ?? [];
  if (number === undefined) throw new UsageError(
    `--budget must be a time such as 10s or 2min, found "${text}".`);
  return Number(number) * { ms: 1, s: 1000, m: 60_000, min: 60_000 }[unit as "ms"];
}
