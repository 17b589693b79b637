/**
 * What an adapter is to the rest of the engine, and which one is used when nobody says. Shared by the Node
 * and the web provider; nothing here touches `navigator` or the `webgpu` package.
 */
import { AdapterError } from "./errors.ts";

export type AdapterKind = "discrete" | "integrated" | "software" | "unknown";

export interface AdapterInfo {
  /** The device's name as the driver gives it, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)". */
  readonly name: string;
  readonly vendor: string;
  readonly architecture: string;
  readonly description: string;
  readonly kind: AdapterKind;
  readonly isSoftware: boolean;
  /** Short key that stays the same between runs: "lavapipe", "swiftshader", "nvidia-h100-80gb-hbm3". */
  readonly id: string;
  /** Smallest and largest subgroup the driver may choose; 0 where the adapter has no subgroups. */
  readonly subgroupMinSize: number;
  readonly subgroupMaxSize: number;
  /** Products of matrices that a subgroup holds together; empty where the adapter has none. */
  readonly subgroupMatrices: readonly SubgroupMatrix[];
  readonly features: string[];
  /** What WGSL may use beside its core, such as "packed_4x8_integer_dot_product". */
  readonly languageFeatures: readonly string[];
  readonly limits: Record<string, number>;
}

/** A product of subgroup matrices: M x K times K x N in one number format, sums in another. */
export interface SubgroupMatrix {
  readonly componentType: string;
  readonly resultComponentType: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/** Who made an adapter, as far as kernels are concerned. */
export type AdapterFamily = "software" | "nvidia" | "amd" | "intel" | "apple" | "qualcomm" | "arm" | "other";

const FAMILY_SIGNS: readonly (readonly [AdapterFamily, RegExp])[] = [
  ["nvidia", /nvidia|geforce|quadro|tesla|tegra/], ["amd", /\bamd\b|radeon|instinct|\bati\b/],
  ["intel", /intel/], ["apple", /apple/], ["qualcomm", /qualcomm|adreno/], ["arm", /\barm\b|mali/],
];

/** The family whose shipped defaults suit an adapter. */
export function adapterFamily({ isSoftware, vendor, architecture, name }: AdapterInfo): AdapterFamily {
  if (isSoftware) return "software";
  const words = `${vendor} ${architecture} ${name}`.toLowerCase();
  return FAMILY_SIGNS.find(([, sign]) => sign.test(words))?.[0] ?? "other";
}

/** One adapter found here. `request` may be called many times: a GPUAdapter makes one device only. */
export interface AdapterHandle {
  readonly info: AdapterInfo;
  request(): Promise<GPUAdapter>;
}

export interface GpuProvider {
  /** Every adapter found, each once, in the order of the driver's preference; empty where there is none. */
  listAdapters(): Promise<AdapterHandle[]>;
}

export interface AdapterChoice {
  readonly handle: AdapterHandle;
  /** Why this adapter, as a clause for a person to read. */
  readonly reason: string;
}

const KIND_ORDER: readonly AdapterKind[] = ["discrete", "integrated", "unknown", "software"];
const KIND_WORDS: Record<AdapterKind, string> = {
  discrete: "discrete GPU",
  integrated: "integrated GPU",
  unknown: "GPU of unknown kind",
  software: "software adapter",
};
/** Software adapters from best to worst; one that is not named here comes after them. */
const SOFTWARE_ORDER: readonly string[] = ["lavapipe", "swiftshader"];

/**
 * Picks the adapter to use: discrete before integrated before software, lavapipe before SwiftShader.
 *
 * @param handles what the provider found
 * @param wanted part of an id, name or description (case is ignored); without it the environment variable
 *   `KRAIT_ADAPTER` is read; without that too, the order above decides
 * @throws AdapterError when there is no adapter at all, or none that matches `wanted`
 */
export function chooseAdapter(handles: readonly AdapterHandle[], wanted?: string): AdapterChoice {
  const fromEnvironment = environment("KRAIT_ADAPTER");
  const pattern = wanted || fromEnvironment;
  const asked = wanted ? `asked for as "${wanted}"` : `selected by KRAIT_ADAPTER=${fromEnvironment}`;
  const ranked = [...handles].sort((a, b) => rank(a.info) - rank(b.info));
  const first = ranked[0];
  if (first === undefined) {
    throw new AdapterError(
      "No WebGPU adapter was found: the GPU driver is missing, or this browser has WebGPU switched off.",
    );
  }
  if (pattern) {
    const handle = matching(ranked, pattern)[0];
    if (handle === undefined) {
      const found = ranked.map(({ info }) => `${info.id} (${info.name})`).join(", ");
      throw new AdapterError(`No adapter matches "${pattern}"; found: ${found}.`);
    }
    return { handle, reason: asked };
  }
  const kind = first.info.kind;
  const others = ranked.slice(1).map(({ info }) => info.id);
  if (others.length === 0) return { handle: first, reason: `the only adapter found, a ${KIND_WORDS[kind]}` };
  return { handle: first, reason: `${KIND_WORDS[kind]}, preferred to ${others.join(", ")}` };
}

/** Keeps the handles whose id, name or description contains `pattern`; case is ignored. */
export function matching(handles: readonly AdapterHandle[], pattern: string): AdapterHandle[] {
  const needle = pattern.toLowerCase();
  return handles.filter(({ info }) =>
    [info.id, info.name, info.description].some((text) => text.toLowerCase().includes(needle)),
  );
}

/** Describes a GPUAdapter; `name` is the driver's name for it where the platform tells. */
export function describeAdapter(
  adapter: GPUAdapter, name?: string, language: Iterable<string> = [],
): AdapterInfo {
  const raw = adapter.info;
  const title = name || raw.description || [raw.vendor, raw.architecture].filter(Boolean).join(" ") || "GPU";
  const words = `${title} ${raw.vendor} ${raw.architecture} ${raw.description}`.toLowerCase();
  const kind = adapterKind(words, raw.isFallbackAdapter === true);
  const limits: Record<string, number> = {};
  for (const key in adapter.limits) {
    const value: unknown = Reflect.get(adapter.limits, key);
    if (typeof value === "number") limits[key] = value;
  }
  return {
    name: title,
    vendor: raw.vendor,
    architecture: raw.architecture,
    description: raw.description,
    kind,
    isSoftware: kind === "software",
    id: adapterId(words, raw.vendor, title),
    subgroupMinSize: raw.subgroupMinSize ?? 0,
    subgroupMaxSize: raw.subgroupMaxSize ?? 0,
    subgroupMatrices: subgroupMatrices(raw),
    features: [...adapter.features].sort(),
    languageFeatures: [...language].sort(),
    limits,
  };
}

/** What Dawn lists with its extension for subgroup matrices; a browser without it lists nothing. */
function subgroupMatrices(info: GPUAdapterInfo): SubgroupMatrix[] {
  const listed = Reflect.get(info, "subgroupMatrixConfigs") as Iterable<SubgroupMatrix> | undefined;
  return [...listed ?? []].map(({ componentType, resultComponentType, M, N, K }) =>
    ({ componentType, resultComponentType, M, N, K }));
}

/**
 * WebGPU does not say whether a GPU has its own memory, so the vendor and the product name decide: `words` is
 * everything the driver says about itself, in lower case.
 */
function adapterKind(words: string, isFallback: boolean): AdapterKind {
  return isFallback ? "software" : KIND_SIGNS.find(([, sign]) => sign.test(words))?.[0] ?? "unknown";
}

/** The first that matches decides, so exceptions stand before what they are exceptions to. */
const KIND_SIGNS: readonly (readonly [AdapterKind, RegExp])[] = [
  ["software", /llvmpipe|lavapipe|swiftshader|software|basic render/],
  ["integrated", /tegra|\borin\b|xavier/],
  ["discrete", /nvidia|geforce|quadro|intel.*\barc\b|xe-2?-?hpg|alchemist|battlemage/],
  ["integrated", /apple|intel|qualcomm|adreno|\barm\b|mali\b|img-tec|powervr|broadcom|videocore|samsung/],
  ["integrated", /radeon(\(tm\))? (vega \d+ )?graphics|radeon(\(tm\))? \d{3}m\b/],
  ["integrated", /\b(raven|renoir|cezanne|rembrandt|raphael|phoenix|van ?gogh)\b/],
  ["discrete", /radeon|\bamd\b|instinct/],
];

function adapterId(words: string, vendor: string, title: string): string {
  if (/llvmpipe|lavapipe/.test(words)) return "lavapipe";
  if (words.includes("swiftshader")) return "swiftshader";
  const named = title.toLowerCase().startsWith(vendor.toLowerCase()) ? title : `${vendor} ${title}`;
  const parts = named.toLowerCase().replace(/\([^)]*\)/g, " ").match(/[a-z0-9]+/g);
  return parts?.join("-") ?? "gpu";
}

function rank(info: AdapterInfo): number {
  const kind = KIND_ORDER.indexOf(info.kind) * 10;
  if (!info.isSoftware) return kind;
  const place = SOFTWARE_ORDER.indexOf(info.id);
  return kind + (place < 0 ? SOFTWARE_ORDER.length : place);
}

/** A variable of the process's environment; undefined in a page. */
export function environment(name: string): string | undefined {
  return typeof process === "undefined" ? undefined : process.env[name];
}
