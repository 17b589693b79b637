/**
 * Devices whose kernels check their own indices. Krait's kernels run with the driver's checks switched off
 * (src/gpu/provider.node.ts), so every one of their indices must lie inside of its array by itself. Here the
 * WGSL is rewritten on its way to the driver: each index goes through a function that notes down one that is
 * too large, and takes 0 in its place.
 */
import type { AdapterHandle } from "../../src/gpu/adapters.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";

/** One index expression of a kernel. */
interface Site {
  readonly where: string;
  readonly text: string;
}

export interface CheckedDevice {
  readonly device: Device;
  /** Runs what was recorded; then the indices that were too large since the last call, one line for each. */
  violations(): Promise<string[]>;
}

const GROUP = 2;
const MOST_SITES = 1 << 15;
/** Elements of a vector or a matrix, which are never fewer where an index is computed. */
const VECTOR = "4";
/** Bytes for one site: the last index that was too large, and the size of the array. */
const NOTE = 8;

/** Past the bracket that closes the one at `open`. */
function closing(code: string, open: number): number {
  const [opener, closer] = code[open] === "<" ? ["<", ">"] : ["[", "]"];
  let depth = 0;
  for (let i = open; i < code.length; i++) {
    if (code[i] === opener) depth++;
    else if (code[i] === closer && --depth === 0) return i + 1;
  }
  throw new Error(`The bracket in "${code.slice(open, open + 40)}" is never closed.`);
}

/** The element count of the array type that `code` holds at `at`: its text, "" for a runtime-sized one. */
function countOf(code: string, at: number): string {
  const type = code.slice(at + 6, closing(code, at + 5) - 1);
  let depth = 0;
  for (let i = 0; i < type.length; i++) {
    if (type[i] === "<") depth++;
    else if (type[i] === ">") depth--;
    else if (type[i] === "," && depth === 0) return type.slice(i + 1).trim();
  }
  return "";
}

/** What a text declares: the element counts of arrays by name, and those of vectors for all else. */
function countsOf(code: string, text: string): Map<string, string> {
  const aliases = new Map([...code.matchAll(/\balias\s+(\w+)\s*=\s*(?=array<)/g)].map((match) =>
    [match[1]!, countOf(code, match.index + match[0].length)] as const));
  const returned = new Map([...code.matchAll(/\bfn\s+(\w+)\([^)]*\)\s*->\s*(?=(\w+))/g)].map((match) => [
    match[1]!,
    match[2] === "array" ? countOf(code, match.index + match[0].length) : aliases.get(match[2]!),
  ] as const));
  const found = new Map<string, string>();
  for (const [name] of text.matchAll(/\w+(?=\s*:)/g)) found.set(name, VECTOR); // parameters
  const declared = /\b(?:var(?:<[^>]*>)?|let|const)\s+(\w+)\s*(?::\s*(?=(\w+)\b)|=\s*(?=(array<|\w+)?))/g;
  for (const match of text.matchAll(declared)) {
    const [whole, name, type] = match as unknown as [string, string, string?];
    const isArray = type === "array" || match[3] === "array<";
    const count = isArray
      ? countOf(text, match.index + whole.length)
      : aliases.get(type ?? match[3] ?? "") ?? returned.get(match[3] ?? "");
    found.set(name, count ?? VECTOR);
  }
  return found;
}

/** Puts every index of linked WGSL through a check. */
export function withCheckedIndices(code: string, label: string, sites: Site[]): string {
  const functions = [...code.matchAll(/\bfn\s+\w+[^{]*\{(?:[^\n]*\}\n|[\s\S]*?\n\})/g)]
    .map((match) => ({ start: match.index, end: match.index + match[0].length, text: match[0] }));
  const outside = functions.reduceRight(
    (text, { start, end }) => text.slice(0, start) + text.slice(end), code);
  const shared = countsOf(code, outside);
  const check = (from: number, to: number, own: Map<string, string>): string => {
    let out = "";
    let at = from;
    for (let i = from; i < to; i++) {
      if (code[i] !== "[") continue;
      const end = closing(code, i);
      const name = /(?<![\w.])\w+$/.exec(code.slice(Math.max(from, i - 80), i))?.[0] ?? "";
      const count = own.get(name) ?? shared.get(name) ?? VECTOR;
      const inner = code.slice(i + 1, end - 1);
      const isLiteral = /^\s*\d+u?\s*$|(% 4u|& 3u)$/.test(inner);
      out += code.slice(at, i + 1);
      if (isLiteral && count !== "") {
        out += inner;
      } else {
        const line = code.slice(0, i).split("\n").length;
        const size = count === "" ? `arrayLength(&${name})` : `u32(${count})`;
        const site = sites.push({ where: `${label}, line ${line}`, text: `${name}[${inner}]` });
        out += `checked_index(u32(${check(i + 1, end - 1, own)}), ${size}, ${site}u)`;
      }
      at = end - 1;
      i = end - 1;
    }
    return out + code.slice(at, to);
  };
  let checked = "";
  let at = 0;
  for (const { start, end, text } of functions) {
    checked += code.slice(at, start) + check(start, end, countsOf(code, text));
    at = end;
  }
  if (sites.length >= MOST_SITES) throw new Error(`There are more than ${MOST_SITES} indices to check.`);
  checked += code.slice(at);
  const entry = /@compute\s+@workgroup_size\(([^)]*)\)\s*fn\s+(\w+)\(((?:[^()]|\([^()]*\))*)\)/g;
  const wrappers = [...checked.matchAll(entry)].map(([, size, name, parameters]) => {
    const names = [...parameters!.matchAll(/(\w+)\s*:/g)].map((match) => match[1]).join(", ");
    return `@compute @workgroup_size(${size}) fn ${name}(${parameters}) {\n  checked_${name}(${names});\n` +
      "  if (too_large.x > 0u) { out_of_bounds[too_large.x - 1u] = too_large.yz; }\n}\n";
  });
  checked = checked.replace(entry, (_, __, name: string, parameters: string) =>
    `fn checked_${name}(${parameters.replaceAll(/@builtin\(\w+\)/g, "")})`);
  return `${checked}
@group(${GROUP}) @binding(0) var<storage, read_write> out_of_bounds: array<vec2u>;
// The first index of the invocation that was too large: its site, from 1, its value and the array's size.
// No branch and no store at every index, which would take a driver minutes to compile.
var<private> too_large: vec3u;
fn checked_index(i: u32, size: u32, site: u32) -> u32 {
  too_large = select(too_large, vec3u(site, i, size), too_large.x == 0u && i >= size);
  return select(i, 0u, i >= size);
}
${wrappers.join("")}`;
}

/** Opens a device of the adapter whose kernels check their indices. */
export async function openChecked(handle: AdapterHandle): Promise<CheckedDevice> {
  const sites: Site[] = [];
  let notes!: GPUBuffer;
  let gpu!: GPUDevice;
  const attach = (raw: GPUDevice): GPUDevice => {
    gpu = raw;
    const layout = raw.createBindGroupLayout({
      entries: [{ binding: 0, visibility: 4, buffer: { type: "storage" } }],
    });
    const nothing = raw.createBindGroupLayout({ entries: [] });
    notes = raw.createBuffer({ size: NOTE * MOST_SITES, usage: 0x80 | 0x08 | 0x04 });
    const group = raw.createBindGroup({ layout, entries: [{ binding: 0, resource: { buffer: notes } }] });
    const { createShaderModule, createPipelineLayout, createCommandEncoder } = raw;
    raw.createShaderModule = (wanted) => createShaderModule.call(raw, {
      ...wanted, code: withCheckedIndices(wanted.code, wanted.label ?? "", sites),
    });
    raw.createPipelineLayout = ({ bindGroupLayouts }) => createPipelineLayout.call(raw, {
      bindGroupLayouts: [...bindGroupLayouts, nothing].slice(0, GROUP).concat(layout),
    });
    raw.createCommandEncoder = (wanted) => {
      const encoder = createCommandEncoder.call(raw, wanted);
      const { beginComputePass } = encoder;
      encoder.beginComputePass = (options) => {
        const pass = beginComputePass.call(encoder, options);
        pass.setBindGroup(GROUP, group);
        return pass;
      };
      return encoder;
    };
    return raw;
  };
  const device = await openDevice({
    tuning: false,
    adapter: {
      info: handle.info,
      async request() {
        const adapter = await handle.request();
        const { requestDevice } = adapter;
        adapter.requestDevice = async (wanted) => attach(await requestDevice.call(adapter, wanted));
        return adapter;
      },
    },
  });
  return {
    device,
    async violations() {
      await device.finish();
      const size = NOTE * sites.length;
      if (size === 0) return [];
      const copy = gpu.createBuffer({ size, usage: 0x01 | 0x08 }); // MAP_READ | COPY_DST
      const encoder = gpu.createCommandEncoder();
      encoder.copyBufferToBuffer(notes, 0, copy, 0, size);
      encoder.clearBuffer(notes, 0, size);
      gpu.queue.submit([encoder.finish()]);
      await copy.mapAsync(1);
      const words = new Uint32Array(copy.getMappedRange().slice(0));
      copy.destroy();
      return sites.flatMap(({ where, text }, i) => {
        const [index, length] = words.subarray(2 * i, 2 * i + 2);
        return length === 0 ? [] : [`${where}: ${text} with index ${index} of ${length}`];
      });
    },
  };
}
