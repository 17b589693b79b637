import { appendFileSync, existsSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { type SoftwareDriver, softwareDriver } from "../../gpu/fallback.node.ts";
import { WEIGHT_FORMATS } from "../../models/parameters.ts";
import { type Device, openDevice } from "../../tensor/device.ts";
import { KraitError, UsageError } from "../../tensor/errors.ts";
import { readDocuments, typescriptDeclarations } from "../../train/data.node.ts";
import { defineCommand } from "../args.ts";
import { benchFormats } from "../bench/formats.ts";
import { benchGenerate } from "../bench/generate.ts";
import { benchGrowth } from "../bench/growth.ts";
import { benchKernels } from "../bench/kernels.ts";
import { type BenchLine, benchLine, makeStamp } from "../bench/line.ts";
import { benchNumerics } from "../bench/numerics.ts";
import { benchOverhead } from "../bench/overhead.ts";
import {
  benchPrecision, finishedRuns, gapsOf, PRECISION_CONFIG, PRECISION_STEPS, PRECISION_SUITE,
    type PrecisionLine,
} from "../bench/precision.ts";
import { writeReport } from "../bench/report.ts";
import { benchRoofline } from "../bench/roofline.ts";
import { Bench } from "../bench/runner.ts";
import { benchLayouts } from "../bench/layouts.ts";
import { benchMemory } from "../bench/memory.ts";
import { benchTrain } from "../bench/train.ts";
import { packagePath } from "../package.ts";
import { Progress } from "../progress.ts";
import { colours, table, wantsColour } from "../terminal.ts";

/** What the command itself reads of a line of the peers suite. */
interface PeerResult {
  readonly case: string;
  readonly peer: string;
  readonly ms: number;
  readonly peer_ms: number;
  readonly ratio: number;
  readonly peer_rel_err: number | null;
  readonly peer_ok: boolean;
}

/** What bench/peers/main.ts exports. */
export interface Peers {
  summarise(results: readonly PeerResult[]): { case: string; peer: string; ratio: number }[];
  benchPeers(
    device: Device, runs: number, filter: readonly string[],
    report: (result: PeerResult) => void, complain: (line: string) => void, software: SoftwareDriver | null,
  ): Promise<void>;
}

/** Every suite but `peers`, in the order in which they run. */
const SUITES: Readonly<Record<string, (bench: Bench) => Promise<void>>> = {
  ceilings: async ({ ceilings }) => {
    await ceilings.of("copy");
    await ceilings.of("matmul");
    await ceilings.dispatch();
  },
  kernels: benchKernels, train: benchTrain, generate: benchGenerate, formats: benchFormats,
  growth: benchGrowth, overhead: benchOverhead, roofline: benchRoofline, numerics: benchNumerics,
  layouts: benchLayouts, memory: benchMemory,
};
/** `peers` takes minutes and needs packages of its own, so it runs only when named. */
const SUITE_NAMES = [...Object.keys(SUITES), PRECISION_SUITE, "peers"];
/** Suites that check rather than measure, or take long: they run only when named. */
const ONLY_NAMED: readonly string[] = ["numerics", "layouts", "memory", PRECISION_SUITE, "peers"];

export const bench = defineCommand({
  name: "bench",
  summary: "Measure kernels, training and generation against what the adapter gives at best.",
  description:
    "Every row shows its share of the ceiling that binds it: the best copy or the best product found on " +
    "the same adapter in the same run. `krait bench report` makes a page of results that --out has " +
    "collected.",
  positionals: [{
    name: "SUITE", optional: true, many: true,
    help: `Of ${SUITE_NAMES.join(", ")}; default: all but ${ONLY_NAMED.join(" and ")}. Or: report.`,
  }],
  options: {
    config: {
      type: "string", value: "PRESET|FILE", default: "tiny",
      help: "The model of the train, generate, formats and roofline suites; of precision too, where tiny " +
        `is ${PRECISION_CONFIG} (PRESET:LAYERS), and of layouts, where tiny is a small and a wide one.`,
    },
    data: {
      type: "string", value: "PATH", multiple: true,
      help: "Text for training steps; default: this package's README, for precision the TypeScript " +
        "declarations of its node_modules.",
    },
    weights: {
      type: "string", choices: WEIGHT_FORMATS, default: "f32",
      help: "How the generate suite holds matrices.",
    },
    batch: { type: "integer", min: 1, default: 2, help: "For layouts: rows of all but the small model." },
    seqlen: { type: "integer", min: 2, default: 512, help: "For layouts: positions of these rows." },
    seeds: { type: "integer", min: 1, default: 3, help: "For precision: runs of every variant." },
    steps: { type: "integer", min: 1, default: PRECISION_STEPS, help: "For precision: updates of a run." },
    runs: { type: "integer", min: 1, default: 7, help: "Timed runs per case; the median counts." },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    case: {
      type: "string", value: "PART", multiple: true, help: "Part of a case's name; default: all cases.",
    },
    out: {
      type: "string", value: "FILE", help: "Append one JSON line per case to this file; report: the page. " +
        "precision repeats no run that the file holds; in a clone it takes bench/results/precision.jsonl.",
    },
    results: {
      type: "string", value: "DIR", help: "For report: folder with .jsonl files (bench/results of a clone).",
    },
    json: { type: "boolean", help: "Print one JSON line per case." },
  },
  examples: [
    "krait bench kernels", "krait bench --adapter swiftshader --json", "krait bench peers --case matmul",
    "krait bench precision --data tinyshakespeare.txt",
      "krait bench report --results results --out report.html",
  ],
  async run({ options, args, stdout, stderr, env, signal }) {
    if (args.includes("report")) {
      if (args.length > 1) throw new UsageError(
        "report makes a page of results and runs no suite beside it.");
      const page = await writeReport(
        options.results ?? packagePath("bench/results"), options.out ?? packagePath("bench/report.html"));
      stdout.write(`${page.path}: ${page.lines} results of ${page.adapters.join(", ")}\n`);
      return;
    }
    for (const name of args) {
      if (!SUITE_NAMES.includes(name)) {
        throw new UsageError(`The suite must be one of ${SUITE_NAMES.join(", ")}, found "${name}".`);
      }
    }
    const peers = args.includes("peers") ? await loadPeers() : null;
    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    if (args.includes("roofline") && !device.gpuDevice.features.has("timestamp-query")) {
      device.destroy();
      throw new KraitError(`The suite roofline needs timestamps, which ${device.info.id} does not offer.`);
    }
    const stamp = makeStamp(device.info);
    const progress = new Progress({ label: "case", silent: options.json, stream: stderr, env });
    const lines: { line: BenchLine; remark: string }[] = [];
    const compared: PeerResult[] = [];
    let step = 0;
    const record = (line: object, file = options.out) => {
      const stamped = JSON.stringify({ ...line, ...stamp, date: new Date().toISOString() });
      if (options.json) stdout.write(`${stamped}\n`);
      if (!file) return;
      mkdirSync(dirname(file), { recursive: true });
      appendFileSync(file, `${stamped}\n`);
    };
    const runsFile = options.out ?? precisionFile();
    let trained: PrecisionLine[] = [];
    const work = new Bench(device, { ...options, cases: options.case }, {
      working: (suite, name) => progress.update({ step: step++, note: `${suite} ${name}` }),
      line(measured, ceiling) {
        const line = benchLine(measured, ceiling);
        if (!measured.minor) lines.push({ line, remark: measured.remark ?? "" });
        record(line);
      },
    });
    try {
      const wanted = args.length > 0 ? args : SUITE_NAMES.filter((name) => !ONLY_NAMED.includes(name));
      for (const [name, suite] of Object.entries(SUITES)) if (wanted.includes(name)) await suite(work);
      if (wanted.includes(PRECISION_SUITE)) {
        trained = await benchPrecision(device, {
          ...options, config: options.config === "tiny" ? PRECISION_CONFIG : options.config,
            cases: options.case,
          signal,
          documents: options.data.length > 0 ? readDocuments(options.data)
            : typescriptDeclarations(packagePath("node_modules")),
        }, {
          done: finishedRuns(runsFile, device.info.id),
          working: (name) => progress.update({ step: step++, note: `${PRECISION_SUITE} ${name}` }),
          finished: (line) => record(line, runsFile),
        });
      }
      await peers?.benchPeers(device, options.runs, options.case, (result) => {
        compared.push(result);
        record({ suite: "peers", ...result });
        progress.update({ step: step++, note: `peers ${result.case} ${result.peer}` });
      }, (line) => progress.log(line.trimEnd()), softwareDriver());
      progress.done(`${lines.length + compared.length + trained.length} cases`);
    } finally {
      progress.done();
      device.destroy();
    }
    if (peers && compared.length === 0) throw new KraitError(
      "No peer could be compared with; stderr says why.");
    if (options.json) return;
    const c = colours(wantsColour(stdout, env));
    if (trained.length > 0) {
      const percent = (x: number) => `${(100 * x).toFixed(2)} %`;
      const gaps = gapsOf(trained).map((g) => [
        ` ${g.variant}`, g.val_loss.toFixed(4), percent(g.gap), `+- ${percent(g.spread)}`,
        percent(g.gap_before), `${g.time.toFixed(2)}x`,
      ]);
      const what = `Validation loss after ${options.steps} updates, and its gap to f32`;
      stdout.write(`${c.bold(`${what}, over ${options.seeds} seeds`)}\n`);
      stdout.write(`${table([["", "nats", "gap", "", "before the switch", "step time"], ...gaps], {
        align: ["left", "right", "right", "right", "right", "right"] })}\n`);
    }
    if (lines.length + compared.length === 0) return;
    stdout.write(`${c.bold(`On ${device.info.name}, medians of up to ${options.runs} runs`)}\n`);
    const rows = lines.map(({ line, remark }) => row(line, remark));
    if (rows.length > 0) stdout.write(`${table(rows, { align: ROW_ALIGN })}\n`);
    const peerRows = compared.map((r) => [
      " peers", r.case, `${r.ms} ms`, r.peer, `${r.peer_ms} ms`, `${r.ratio}x`,
      r.peer_ok ? "" : `wrong by ${r.peer_rel_err}`,
    ]);
    if (peerRows.length > 0) stdout.write(`${table(peerRows)}\n`);
    const best = (peers?.summarise(compared) ?? []).map((s) => [` ${s.case}`, `${s.ratio}x`, s.peer]);
    if (best.length > 0) {
      stdout.write(`${c.bold("Against the fastest right answer on the adapter")}\n${table(best)}\n`);
    }
  },
});

const ROW_ALIGN = ["left", "left", "right", "left", "right", "left", "left"] as const;
const UNITS = { copy: "of the copy rate", matmul: "of the product rate" } as const;

function row(line: BenchLine, remark: string): string[] {
  const { ms, min_ms, max_ms, bound, share, rate, unit } = line;
  const brief = (x: number) => (x >= 1000 ? x.toFixed(0) : String(Number(x.toPrecision(3))));
  return [
    ` ${line.suite}`, line.case, ms === null ? "" : `${brief(ms)} ms`,
    ms === null ? "" : `${brief(min_ms!)} to ${brief(max_ms!)}`,
    unit === "bytes" || unit === "ms" ? "" : `${brief(rate)} ${unit}`,
    bound === null || share === null ? "" : `${Math.round(100 * share)} % ${UNITS[bound]}`, remark,
  ];
}

/** Where a clone keeps the runs of the precision suite; undefined for an installed package. */
function precisionFile(): string | undefined {
  const folder = packagePath("bench/results");
  return existsSync(folder) ? join(folder, "precision.jsonl") : undefined;
}

/** The peers suite lives beside the sources and not in the package. */
async function loadPeers(): Promise<Peers> {
  const module = packagePath("bench/peers/main.ts");
  if (!existsSync(module)) {
    throw new UsageError(
      "The suite peers needs a clone of the sources and: npm install --ignore-scripts --prefix bench/peers");
  }
  return await import(/* @vite-ignore */ pathToFileURL(module).href) as Peers;
}
