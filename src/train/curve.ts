/**
 * The loss curve of a run as one SVG text: no scripts, no requests, light and dark by the viewer's
 * preference.
 */

export interface CurvePoint {
  readonly step: number;
  readonly loss: number;
}

/** A horizontal line to compare with, such as an n-gram model's loss. */
export interface ReferenceLine {
  readonly label: string;
  readonly value: number;
}

export interface CurveOptions {
  readonly train: readonly CurvePoint[];
  readonly validation?: readonly CurvePoint[];
  /** All values share one unit, which `yLabel` names. */
  readonly references?: readonly ReferenceLine[];
  /** Default "Loss". */
  readonly title?: string;
  /** Text under the title. Default: how to read the two training lines. */
  readonly subtitle?: string;
  /** Default "nats per token". */
  readonly yLabel?: string;
  /** Default "step". */
  readonly xLabel?: string;
  /** Pixels. Default 960 x 480. */
  readonly width?: number;
  readonly height?: number;
  /** Points in the moving average of the training loss. Default: a fortieth of them. */
  readonly window?: number;
}

interface Label {
  readonly text: string;
  readonly kind: "train" | "validation" | "reference";
  readonly at: number;
  y: number;
}

const STYLE = `
.krait-curve{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.krait-curve .page{fill:#ffffff}
.krait-curve .title{fill:#1b1f24;font-size:16px;font-weight:600}
.krait-curve .note{fill:#667085}
.krait-curve .grid{stroke:#e7eaee}
.krait-curve .axis{stroke:#c3cad3}
.krait-curve .raw{stroke:#2f6fd0;stroke-opacity:.28;fill:none}
.krait-curve .band{fill:#2f6fd0;fill-opacity:.2}
.krait-curve .train{stroke:#2f6fd0;stroke-width:2;fill:none}
.krait-curve .validation{stroke:#d4620c;stroke-width:1.5;fill:none}
.krait-curve .point{fill:#d4620c;stroke:#ffffff;stroke-width:1.5}
.krait-curve .reference{stroke:#8a94a3;stroke-dasharray:5 4;fill:none}
.krait-curve .leader{stroke-width:1;fill:none;stroke-dasharray:none}
.krait-curve text.of-train{fill:#2459ab;font-weight:600}
.krait-curve text.of-validation{fill:#b04f06;font-weight:600}
.krait-curve text.of-reference{fill:#667085}
@media (prefers-color-scheme:dark){
.krait-curve .page{fill:#14171c}
.krait-curve .title{fill:#eef1f5}
.krait-curve .note{fill:#98a2b3}
.krait-curve .grid{stroke:#262b33}
.krait-curve .axis{stroke:#414954}
.krait-curve .raw{stroke:#6ba4ff;stroke-opacity:.34}
.krait-curve .band{fill:#6ba4ff;fill-opacity:.25}
.krait-curve .train{stroke:#6ba4ff}
.krait-curve .validation{stroke:#ffa259}
.krait-curve .point{fill:#ffa259;stroke:#14171c}
.krait-curve .reference{stroke:#7d8796}
.krait-curve text.of-train{fill:#8fbaff}
.krait-curve text.of-validation{fill:#ffb77d}
.krait-curve text.of-reference{fill:#a3adbb}
}
`;

/** The smallest distance between two labels in the right margin, in pixels. */
const LABEL_GAP = 16;

/**
 * Draws training loss (every step, and its moving average), validation points and reference lines, each named
 * at the right edge with its last value. Points that are not finite are left out. Runs without any point give
 * an empty frame.
 */
export function lossCurve(options: CurveOptions): string {
  const { width = 960, height = 480, title = "Loss", yLabel = "nats per token", xLabel = "step" } = options;
  const train = options.train.filter(isFinitePoint);
  const validation = (options.validation ?? []).filter(isFinitePoint);
  const references = (options.references ?? []).filter(({ value }) => Number.isFinite(value));
  const window = options.window ?? Math.max(1, Math.round(train.length / 40));
  const means = movingAverage(train.map((p) => p.loss), window);
  const smooth = means.map((loss, i) => ({ step: train[i]!.step, loss }));

  const values = [...train, ...validation].map((p) => p.loss).concat(references.map((r) => r.value));
  const steps = [...train, ...validation].map((p) => p.step);
  const [yFrom, yTo] = padded(min(values, 0), max(values, 1));
  const [xFrom, xTo] = [Math.min(0, min(steps, 0)), Math.max(1, max(steps, 1))];
  const yTicks = niceTicks(yFrom, yTo, Math.max(2, Math.round(height / 70)));
  const xTicks = niceTicks(xFrom, xTo, Math.max(2, Math.round(width / 130))).filter(Number.isInteger);

  const digits = decimals(yTicks);
  const labels: Label[] = [];
  const label = (kind: Label["kind"], name: string, at: number): void => {
    labels.push({ kind, text: `${name} ${at.toFixed(Math.max(2, digits))}`, at, y: 0 });
  };
  if (smooth.length > 0) label("train", "train", smooth.at(-1)!.loss);
  if (validation.length > 0) label("validation", "validation", validation.at(-1)!.loss);
  for (const reference of references) label("reference", reference.label, reference.value);

  const left = 64;
  const right = width - 32 - Math.max(40, ...labels.map(({ text }) => text.length * 6.8));
  const top = 72;
  const bottom = height - 52;
  const x = (step: number): number => left + ((step - xFrom) / (xTo - xFrom)) * (right - left);
  const y = (loss: number): number => bottom - ((loss - yFrom) / (yTo - yFrom)) * (bottom - top);
  const line = (points: readonly CurvePoint[]): string => points
    .map((p, i) => `${i === 0 ? "M" : "L"}${round(x(p.step))} ${round(y(p.loss))}`).join("");
  placeLabels(labels, y, top, bottom);

  // With several steps per pixel a line would fill the area between the extremes with a moiré of strokes.
  const dense = train.length > 3 * (right - left);
  const [low, high] = dense ? extremes(train, x) : [[], []];
  const raw = dense
    ? `<path class="band" d="${line([...high, ...low.toReversed()])}Z"/>`
    : `<path class="raw" stroke-linejoin="round" d="${line(train)}"/>`;
  const note = options.subtitle
    ?? (window > 1 ? `${dense ? "Shaded" : "Thin"}: every step. Bold: mean of the last ${window}.` : "");
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" class="krait-curve" role="img" viewBox="0 0 ${width} ${height}" `
    + `width="${width}" height="${height}">`,
    `<title>${escape(title)}</title>`,
    `<desc>${escape(describe(labels, steps, [yLabel, xLabel]))}</desc>`,
    `<style>${STYLE}</style>`,
    `<rect class="page" width="${width}" height="${height}" rx="8"/>`,
    text(24, 30, title, "title"),
    text(24, 50, note, "note"),
    ...yTicks.flatMap((tick) => [
      `<path class="grid" d="M${left} ${round(y(tick))}H${round(right)}"/>`,
      text(left - 8, y(tick) + 4, tick.toFixed(digits), "note", "end"),
    ]),
    `<path class="axis" d="M${left} ${bottom}H${round(right)}"/>`,
    ...xTicks.flatMap((tick) => [
      `<path class="axis" d="M${round(x(tick))} ${bottom}v5"/>`,
      text(x(tick), bottom + 20, stepText(tick), "note", "middle"),
    ]),
    text((left + right) / 2, height - 14, xLabel, "note", "middle"),
    `<text class="note" text-anchor="middle" transform="translate(20 ${(top + bottom) / 2}) rotate(-90)">`
    + `${escape(yLabel)}</text>`,
    ...references.map((r) => `<path class="reference" d="M${left} ${round(y(r.value))}H${round(right)}"/>`),
    window > 1 ? raw : "",
    `<path class="train" stroke-linejoin="round" d="${line(thinned(smooth, x))}"/>`,
    `<path class="validation" stroke-linejoin="round" d="${line(validation)}"/>`,
    ...validation.map((p) => {
      return `<circle class="point" cx="${round(x(p.step))}" cy="${round(y(p.loss))}" r="4"/>`;
    }),
    ...labels.flatMap((l) => [
      `<path class="${l.kind} leader" d="M${round(right + 2)} ${round(y(l.at))}`
      + `L${round(right + 12)} ${round(l.y)}"/>`,
      text(right + 17, l.y + 4, l.text, `of-${l.kind}`),
    ]),
    `</svg>`,
  ];
  return `${parts.filter((part) => part !== "").join("\n")}\n`;
}

/**
 * Round numbers within from..to (from < to): steps of 1, 2, 2.5 or 5 times a power of ten, about `count` of
 * them.
 */
export function niceTicks(from: number, to: number, count: number): number[] {
  const rough = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5].find((factor) => factor * power >= rough * 0.999) ?? 10);
  const first = Math.ceil(from / step - 1e-9);
  const last = Math.floor(to / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/**
 * y[i] = mean of the last min(window, 1 + i/8) values up to i. The window starts short, where a loss falls
 * fast and a long one would lag behind.
 */
export function movingAverage(values: readonly number[], window: number): number[] {
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1)! + value);
  return values.map((_, i) => {
    const length = Math.max(1, Math.min(window, 1 + Math.floor(i / 8)));
    return (sums[i + 1]! - sums[i + 1 - length]!) / length;
  });
}

/** The lowest and the highest point of every pixel column. */
function extremes(points: readonly CurvePoint[], x: (step: number) => number): [CurvePoint[], CurvePoint[]] {
  const lows: CurvePoint[] = [];
  const highs: CurvePoint[] = [];
  let column = NaN;
  for (const point of points) {
    if (Math.floor(x(point.step)) !== column) {
      column = Math.floor(x(point.step));
      lows.push(point);
      highs.push(point);
    } else {
      if (point.loss < lows.at(-1)!.loss) lows[lows.length - 1] = point;
      if (point.loss > highs.at(-1)!.loss) highs[highs.length - 1] = point;
    }
  }
  return [lows, highs];
}

/** The last point of every half pixel column: the same line in fewer points. */
function thinned(points: readonly CurvePoint[], x: (step: number) => number): CurvePoint[] {
  return points.filter((point, i) => {
    const next = points[i + 1];
    return i === 0 || next === undefined || Math.floor(2 * x(next.step)) !== Math.floor(2 * x(point.step));
  });
}

/**
 * Puts every label at its value's height; labels that would overlap are stacked around their mean, within
 * the frame.
 */
function placeLabels(labels: Label[], y: (value: number) => number, top: number, bottom: number): void {
  labels.sort((p, q) => q.at - p.at);
  let stacks = labels.map((label) => ({ labels: [label], start: y(label.at) }));
  for (let merged = true; merged;) {
    merged = false;
    const next: typeof stacks = [];
    for (const stack of stacks) {
      const above = next.at(-1);
      if (above && above.start + above.labels.length * LABEL_GAP > stack.start) {
        above.labels.push(...stack.labels);
        const mean = above.labels.reduce((sum, label) => sum + y(label.at), 0) / above.labels.length;
        const extent = (above.labels.length - 1) * LABEL_GAP;
        above.start = Math.max(top, Math.min(mean - extent / 2, bottom - extent));
        merged = true;
      } else {
        next.push(stack);
      }
    }
    stacks = next;
  }
  for (const stack of stacks) stack.labels.forEach((label, i) => (label.y = stack.start + i * LABEL_GAP));
}

/** The range with 4 % of room at both ends. */
function padded(from: number, to: number): [number, number] {
  const room = (to - from) * 0.04 || Math.abs(from) * 0.1 || 1;
  return [from - room, to + room];
}

function describe(labels: readonly Label[], steps: readonly number[], units: [y: string, x: string]): string {
  if (steps.length === 0) return "No points yet.";
  return `Loss in ${units[0]} up to ${units[1]} ${max(steps, 0)}: ${labels.map((l) => l.text).join(", ")}.`;
}

function text(x: number, y: number, content: string, style: string, anchor = "start"): string {
  if (content === "") return "";
  const place = `x="${round(x)}" y="${round(y)}" text-anchor="${anchor}"`;
  return `<text class="${style}" ${place}>${escape(content)}</text>`;
}

function stepText(step: number): string {
  if (step >= 1e6 && step % 1e5 === 0) return `${step / 1e6}M`;
  if (step >= 1e4 && step % 100 === 0) return `${step / 1e3}k`;
  return String(step);
}

function decimals(ticks: readonly number[]): number {
  return Math.max(...ticks.map((tick) => String(tick).split(".")[1]?.length ?? 0));
}

function isFinitePoint(point: CurvePoint): boolean {
  return Number.isFinite(point.step) && Number.isFinite(point.loss);
}

// Spreading a long run into Math.min would overflow the stack.
function min(values: readonly number[], empty: number): number {
  return values.length === 0 ? empty : values.reduce((a, b) => Math.min(a, b));
}

function max(values: readonly number[], empty: number): number {
  return values.length === 0 ? empty : values.reduce((a, b) => Math.max(a, b));
}

function round(value: number): string {
  return String(Math.round(value * 10) / 10);
}

function escape(content: string): string {
  return content.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
