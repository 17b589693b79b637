import { provider } from "#gpu";
import { type AdapterHandle, chooseAdapter } from "../../gpu/adapters.ts";
import { median, sortedTimes } from "../../gpu/measure.ts";
import { scale } from "../../ops/elementwise.ts";
import { matmul } from "../../ops/matmul.ts";
import { rms_norm } from "../../ops/rms_norm.ts";
import * as reference from "../../reference/index.ts";
import { type Device, openDevice } from "../../tensor/device.ts";
import { type NdArray, ndarray, sizeOf } from "../../tensor/ndarray.ts";
import { fillNormal } from "../../tensor/philox.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import { defineCommand } from "../args.ts";
import { colours, formatBytes, table, wantsColour } from "../terminal.ts";

interface Check {
  readonly name: string;
  readonly error: number;
  readonly allowed: number;
  readonly passed: boolean;
}

interface Report {
  readonly adapters: AdapterHandle["info"][];
  readonly chosen: string | null;
  readonly reason: string;
  readonly checks: Check[];
  /** GB/s read and written, of y = c x over 64 MiB. */
  readonly copy_gb_per_s: number | null;
  /** f32, 512 cubed. */
  readonly matmul_gflop_per_s: number | null;
  /** What is missing, and what to do about it. */
  readonly advice: string[];
  readonly ok: boolean;
}

const LIMITS = [
  "maxBufferSize", "maxStorageBufferBindingSize", "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize", "maxComputeInvocationsPerWorkgroup",
];

const ENOUGH_MS = 1000;

export const doctor = defineCommand({
  name: "doctor",
  summary: "Show the GPU adapters found, test the one that would be used, and measure it.",
  options: {
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    json: { type: "boolean", help: "Print one JSON object instead of text." },
  },
  examples: ["krait doctor", "krait doctor --adapter swiftshader --json"],
  async run({ options, stdout, env }) {
    const report = await examine(options.adapter);
    const text = options.json
      ? JSON.stringify(report, null, 2)
      : render(report, colours(wantsColour(stdout, env)));
    stdout.write(`${text}\n`);
    return report.ok ? 0 : 1;
  },
});

async function examine(wanted: string | undefined): Promise<Report> {
  const empty = { chosen: null, checks: [], copy_gb_per_s: null, matmul_gflop_per_s: null, ok: false };
  let adapters: AdapterHandle[] = [];
  try {
    adapters = await provider.listAdapters();
    const { handle, reason } = chooseAdapter(adapters, wanted);
    const device = await openDevice({ adapter: handle });
    try {
      const checks = await selfTest(device);
      return {
        adapters: adapters.map(({ info }) => info), chosen: handle.info.id, reason, checks,
        copy_gb_per_s: await copyRate(device), matmul_gflop_per_s: await matmulRate(device),
        advice: advise(adapters, handle, device), ok: checks.every(({ passed }) => passed),
      };
    } finally {
      device.destroy();
    }
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    return { ...empty, adapters: adapters.map(({ info }) => info), reason, advice: advise(adapters) };
  }
}

/** Two products and a norm against their float64 definitions. */
async function selfTest(device: Device): Promise<Check[]> {
  const draw = (shape: number[], stream: number): NdArray =>
    ndarray(
      shape, fillNormal({ seed: 1, stream, step: 0 }, new Float64Array(sizeOf(shape))).map(Math.fround));
  const upload = (x: NdArray) => device.tensor(Float32Array.from(x.data), x.shape);
  const check = async (
    name: string, allowed: number, expected: NdArray, run: () => Tensor,
  ): Promise<Check> => {
    const tensor = run();
    const found = await tensor.read();
    tensor.dispose();
    const largest = expected.data.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    const error =
      expected.data.reduce((worst, value, i) => Math.max(worst, Math.abs(value - found[i]!)), 0) / largest;
    return { name, error, allowed, passed: error <= allowed };
  };
  const [a, b, w] = [draw([67, 129], 0), draw([129, 65], 1), draw([129], 2)];
  return [
    await check(
      "matmul 67 x 129 x 65", 4e-6, reference.matmul(a, b, {}),
      () => scope(() => matmul(upload(a), upload(b), {}))),
    await check(
      "rms_norm 67 x 129", 2e-6, reference.rms_norm(a, w, 1e-5),
      () => scope(() => rms_norm(upload(a), upload(w), 1e-5))),
  ];
}

async function copyRate(device: Device): Promise<number> {
  const count = 2 ** 24;
  const x = device.zeros([count]);
  const ms = await medianTime(device, () => scale(x, 2));
  x.dispose();
  device.pool.trim();
  return (2 * 4 * count) / ms / 1e6;
}

async function matmulRate(device: Device): Promise<number> {
  const n = 512;
  const a = device.zeros([n, n]);
  const ms = await medianTime(device, () => matmul(a, a, {}));
  a.dispose();
  return (2 * n ** 3) / ms / 1e6;
}

/** Milliseconds of an op, after a first time that compiles. */
async function medianTime(device: Device, op: () => Tensor): Promise<number> {
  const finish = () => device.finish();
  const work = () => scope(() => void op());
  await sortedTimes(1, work, finish);
  return median(await sortedTimes(5, work, finish, ENOUGH_MS));
}

/** What the lack of an optional feature means. */
const CONSEQUENCES = {
  "shader-f16": "nothing is lost, since everything is computed in f32 so far",
  subgroups: "kernels use their plain variants",
  "timestamp-query": "--trace has the host's times, without kernels",
} as const;

function advise(adapters: readonly AdapterHandle[], chosen?: AdapterHandle, device?: Device): string[] {
  const advice: string[] = [];
  if (adapters.length === 0) {
    advice.push(
      "No adapter: install the Node packages with `npm install webgpu@0.6.2 @sparticuz/chromium@147.0.0` " +
      "(the second brings a software driver for Linux x64), or a Vulkan driver for your GPU.");
  } else if (chosen?.info.isSoftware) {
    advice.push(
      "Only software adapters were found. With a GPU, install its Vulkan driver (Debian/Ubuntu: " +
      "`apt install mesa-vulkan-drivers` for AMD and Intel, the vendor's package for NVIDIA) " +
      "and run this again.");
    if (chosen.info.id === "swiftshader") {
      advice.push(
        "Mesa's lavapipe is several times faster than SwiftShader and has f16: " +
        "`apt install mesa-vulkan-drivers` (version 23 or later; on Debian 12 from bookworm-backports).");
    }
  }
  if (!device) return advice;
  for (const [name, consequence] of Object.entries(CONSEQUENCES)) {
    if (device.gpuDevice.features.has(name)) continue;
    const offered = device.info.features.includes(name);
    const lack = offered ? `Opened without ${name}, as the environment says` : `No ${name}`;
    advice.push(`${lack}: ${consequence}.`);
  }
  return advice;
}

function render(report: Report, c: ReturnType<typeof colours>): string {
  const lines: string[] = [c.bold("Adapters")];
  const rows = report.adapters.map((info) => [
    info.id === report.chosen ? "*" : " ", info.id, info.kind, info.vendor, info.name,
    info.subgroupMaxSize ? `subgroups ${info.subgroupMinSize}-${info.subgroupMaxSize}` : "no subgroups",
    info.features.includes("shader-f16") ? "f16" : "no f16",
  ]);
  lines.push(rows.length > 0 ? table(rows) : "  none");
  lines.push("", report.chosen ? `Chosen: ${report.chosen}, ${report.reason}.` : report.reason);
  const chosen = report.adapters.find(({ id }) => id === report.chosen);
  if (chosen) {
    const show = (name: string) =>
      /Size$/.test(name) ? formatBytes(chosen.limits[name]!) : String(chosen.limits[name]);
    lines.push("", c.bold("Limits"), table(LIMITS.map((name) => [` ${name}`, show(name)])));
    lines.push("", c.bold("Features"), `  ${chosen.features.join(", ")}`);
  }
  if (report.checks.length > 0) {
    lines.push("", c.bold("Self test (error relative to the largest entry, against float64)"));
    lines.push(table(report.checks.map(({ name, error, allowed, passed }) => [
      passed ? c.green(" ok") : c.red(" FAILED"), name, error.toExponential(1),
      `allowed ${allowed.toExponential(0)}`,
    ])));
    lines.push("", c.bold("Measured"));
    lines.push(table([
      [" copy, 64 MiB read and written", `${report.copy_gb_per_s!.toFixed(1)} GB/s`],
      [" matmul f32, 512 cubed", `${report.matmul_gflop_per_s!.toFixed(1)} GFLOP/s`],
    ]));
  }
  if (report.advice.length > 0) lines.push("", c.bold("Next"), ...report.advice.map((line) => `  ${line}`));
  return lines.join("\n");
}
