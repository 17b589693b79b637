/** Adapters of a Node process, through Dawn. The only file that imports the `webgpu` package. */
import { constants } from "node:os";
import { describeAdapter } from "./adapters.ts";
import { AdapterError } from "./errors.ts";
import { hasSystemDrivers, softwareDriver } from "./fallback.node.ts";
import type { AdapterHandle, GpuProvider } from "./adapters.ts";
import type { SoftwareDriver } from "./fallback.node.ts";

export type { AdapterHandle, AdapterInfo, GpuProvider } from "./adapters.ts";

type Dawn = typeof import("webgpu");

const BACKEND = process.platform === "darwin" ? "metal" : process.platform === "win32" ? "d3d12" : "vulkan";
/** Dawn hides what is not yet in the standard (subgroup matrices among it) unless this is on. */
const ENABLED = ["allow_unsafe_apis"];
/**
 * Dawn and the driver check every index of every kernel, which takes SwiftShader up to half of the time of a
 * kernel that memory bounds; lavapipe does not feel it, and no GPU was measured. Krait's kernels let nothing
 * lead out of a tensor, whatever tensors hold: test/ops/bounds.test.ts runs them with each index compared.
 * KRAIT_ROBUSTNESS=on keeps the driver's checks, for kernels in the making.
 */
const UNCHECKED = /swiftshader/i;

/** What Dawn is asked to do otherwise for the adapter `name`. */
function toggles(name: string): string[] {
  const isUnchecked = UNCHECKED.test(name) && process.env["KRAIT_ROBUSTNESS"] !== "on";
  return [
    `enable-dawn-features=${[...ENABLED, ...(isUnchecked ? ["disable_robustness"] : [])].join()}`,
    // Timestamps in steps of 65 us protect visitors of web pages; a profile needs the real ones.
    "disable-dawn-features=timestamp_quantization",
  ];
}

/** No driver is called this: Dawn answers with the list of names it does know. */
const NO_SUCH_NAME = "krait-lists-adapters";
// Dawn's objects do not keep their instance alive, so every instance lives as long as the process.
const instances: GPU[] = [];

let found: Promise<AdapterHandle[]> | undefined;

async function findAdapters(): Promise<AdapterHandle[]> {
  const { create } = await load();
  let driver: SoftwareDriver | null = null;
  let trouble: Error | null = null;
  try {
    driver = softwareDriver();
  } catch (error) {
    trouble = error as Error; // matters only where there is no other adapter
  }
  if (driver !== null) provideLoader(driver);
  const handles: AdapterHandle[] = [];
  // Without any manifest there is nothing to ask for, and the Vulkan loader would complain on stderr.
  if (BACKEND !== "vulkan" || hasSystemDrivers()) {
    for (const name of await systemNames(create)) {
      const handle = await open(create, name, null);
      if (handle !== null) handles.push(handle);
    }
  }
  if (driver !== null && !handles.some(({ info }) => info.id === "swiftshader")) {
    const handle = await open(create, "SwiftShader Device (Subzero)", driver);
    if (handle !== null) handles.push(handle);
  }
  if (handles.length === 0 && trouble !== null) {
    throw new AdapterError(`Found no GPU driver, and SwiftShader cannot be unpacked: ${trouble.message}`);
  }
  return handles;
}

/** Looks once per process. A worker thread sees SwiftShader only if it was started with `env: SHARE_ENV`. */
export const provider: GpuProvider = {
  async listAdapters() {
    found ??= findAdapters();
    return [...await found];
  },
};

const LONGEST_NAP_MS = 0.4;
const napper = new Int32Array(new SharedArrayBuffer(4));
let waits = 0;
let since = 0;
let napping = false;

/**
 * Waits for work of a software adapter, and sleeps meanwhile. While any promise of Dawn is pending Node asks
 * it for news in a loop, on a core that the adapter needs for the work itself; a nap in every turn of that
 * loop, short beside the time waited already, leaves the core to it.
 */
export async function unhurried<T>(work: Promise<T>): Promise<T> {
  if (waits++ === 0) since = performance.now();
  if (!napping) setImmediate(nap);
  napping = true;
  try {
    return await work;
  } finally {
    waits--;
  }
}

function nap(): void {
  napping = waits > 0;
  if (!napping) return;
  const waited = performance.now() - since;
  if (waited > 0.1) Atomics.wait(napper, 0, 0, Math.min(waited / 32, LONGEST_NAP_MS));
  setImmediate(nap);
}

/** Loads Dawn and makes WebGPU's constants (GPUBufferUsage, GPUMapMode, ...) global, as in a browser. */
async function load(): Promise<Dawn> {
  let module: Dawn;
  try {
    module = await import("webgpu");
  } catch (error) {
    const missing = (error as { code?: string }).code === "ERR_MODULE_NOT_FOUND";
    const what = missing
      ? "Running in Node needs the package webgpu; install it with: npm install webgpu"
      : `The package webgpu does not load on ${process.platform}-${process.arch}: ${String(error)}`;
    throw new AdapterError(what, { cause: error });
  }
  for (const [name, value] of Object.entries(module.globals)) {
    if (name in globalThis) continue;
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  }
  return module;
}

/** Names of the adapters of this machine's own drivers, fastest kind first; "" is whatever comes first. */
async function systemNames(create: Dawn["create"]): Promise<string[]> {
  try {
    const gpu = create([`backend=${BACKEND}`, `adapter=${NO_SUCH_NAME}`]);
    instances.push(gpu);
    await gpu.requestAdapter({ powerPreference: "high-performance" });
    return [];
  } catch (error) {
    const lines = [...String(error).matchAll(/^ \* backend: '([^']*)', name: '(.*)'$/gm)];
    const names = lines.filter((line) => line[1] === BACKEND).map((line) => line[2] ?? "");
    return names.length > 0 ? [...new Set(names)] : [""];
  }
}

/** Opens the adapter `name`, of this machine's drivers or of `driver` alone; null where it is not there. */
async function open(
  create: Dawn["create"], name: string, driver: SoftwareDriver | null,
): Promise<AdapterHandle | null> {
  const gpu = create([`backend=${BACKEND}`, ...toggles(name), ...(name ? [`adapter=${name}`] : [])]);
  instances.push(gpu);
  const ask = async () => {
    try {
      return await withDriver(driver, () => gpu.requestAdapter());
    } catch {
      return null; // Dawn throws when it knows no adapter of that name
    }
  };
  const first = await ask();
  if (first === null) return null;
  const info = describeAdapter(first, name, gpu.wgslLanguageFeatures);
  return {
    info,
    async request() {
      const adapter = await ask();
      if (!adapter) throw new AdapterError(`The driver no longer offers the adapter ${info.id}.`);
      return adapter;
    },
  };
}

/**
 * Calls `body` while the Vulkan loader's environment names `driver` and nothing else. An instance reads it
 * when it is first asked for an adapter, before that call returns, so this machine's own drivers are left out
 * of it entirely.
 */
function withDriver<T>(driver: SoftwareDriver | null, body: () => T): T {
  if (driver === null) return body();
  const names = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"]; // loaders before 1.3.207 know the second only
  const before = names.map((name) => process.env[name]);
  for (const name of names) process.env[name] = driver.manifest;
  try {
    return body();
  } finally {
    for (const [i, name] of names.entries()) {
      const value = before[i];
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  }
}

/** Loads the packaged Vulkan loader where this machine has none; Dawn then finds it by its usual name. */
function provideLoader(driver: SoftwareDriver): void {
  const { RTLD_NOW, RTLD_GLOBAL } = constants.dlopen;
  const RTLD_NODELETE = 0x1000;
  const load = (path: string) => {
    try {
      process.dlopen({ exports: {} }, path, RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
    } catch (error) {
      // It is no Node module and Node says so, but the library stays loaded.
      return String(error).includes("did not self-register");
    }
    return true;
  };
  if (!load("libvulkan.so.1")) load(driver.loader);
}
