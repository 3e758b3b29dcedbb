/**
 * Draws `docs/bench.svg`, the chart of `deno task bench`, with Observable Plot.
 *
 * Nothing but the bench imports this, so nothing else downloads Plot.
 *
 * @module
 */
import * as Plot from "@observablehq/plot";
import { parseHTML as parseHTMLUntyped } from "linkedom";

// The types of linkedom need those of a browser.
const parseHTML = parseHTMLUntyped as unknown as (
  html: string,
) => { document: Plot.PlotOptions["document"] };

/** How fast one server was in a room of one size. */
export interface Figure {
  /** The server, as the chart names it. */
  server: string;
  /** How many clients received each line. */
  size: number;
  /** How many lines all clients together received in a second. */
  rate: number;
}

const WIDTH = 720, HEIGHT = 400;

// An image follows the reader's colour scheme, but not the page around it, so it
// brings its own background. The colours have a contrast of 4.5 and more to it.
const STYLE = `
.parley { color: #1f2328; --background: #ffffff; --grid: #d1d9e0 }
.parley { --first: #0758b8; --second: #a04100; --third: #57606a }
@media (prefers-color-scheme: dark) {
  .parley { color: #e6edf3; --background: #0d1117; --grid: #3d444d }
  .parley { --first: #6cb0ff; --second: #f0964b; --third: #a5afba }
}
.parley .background { fill: var(--background) }
`;

const COLORS = ["var(--first)", "var(--second)", "var(--third)"];

/**
 * Draws the servers' figures.
 *
 * @param figures the servers, the most important one first, each by rising size
 * @param note a line below the title
 * @returns a document in SVG, legible on a light and on a dark page
 */
export function drawChart(figures: Figure[], note: string): string {
  const { document } = parseHTML("<html></html>");
  const servers = [...new Set(figures.map(({ server }) => server))];
  const last = figures.filter(({ server, size }) =>
    !figures.some((other) => other.server === server && other.size > size)
  );
  const rates = figures.map(({ rate }) => Math.log10(rate));
  const lowest = Math.floor(Math.min(...rates));
  const highest = Math.ceil(Math.max(...rates));
  const decades = Array.from(
    { length: highest - lowest + 1 },
    (_, i) => 10 ** (lowest + i),
  );
  const channels = { x: "size", y: "rate" } as const;
  const svg = Plot.plot({
    document,
    width: WIDTH,
    height: HEIGHT,
    marginTop: 84,
    marginLeft: 88,
    marginRight: 110,
    marginBottom: 60,
    style: { fontSize: "13px" },
    x: {
      type: "log",
      ticks: [...new Set(figures.map(({ size }) => size))],
      tickFormat: inEnglish,
      label: "clients in the room that receive each line",
      labelAnchor: "center",
      labelArrow: "none",
      labelOffset: 42,
    },
    y: {
      type: "log",
      domain: [decades[0], decades.at(-1)],
      ticks: decades,
      tickFormat: inEnglish,
      label: null,
    },
    color: { domain: servers, range: COLORS },
    marks: [
      Plot.gridY({ ticks: decades, stroke: "var(--grid)", strokeOpacity: 1 }),
      Plot.line(figures, { ...channels, stroke: "server", strokeWidth: 2.5 }),
      Plot.dot(figures, { ...channels, fill: "server", r: 4 }),
      Plot.text(last, {
        ...channels,
        text: "server",
        fill: "server",
        textAnchor: "start",
        fontWeight: "bold",
        dx: 10,
      }),
      heading("Lines delivered in a second, while ten clients talk at once", {
        dy: -62,
        fontSize: 17,
        fontWeight: "bold",
      }),
      heading(note, { dy: -38 }),
    ],
  });
  const { outerHTML } = svg;
  const title = "Lines delivered in a second, by server and size of the room";
  return outerHTML
    .replace(/^<svg /, '<svg xmlns="http://www.w3.org/2000/svg" role="img" ')
    .replace('class="', 'class="parley ')
    .replace(
      ">",
      `><title>${title}</title><desc>${describe(figures)}</desc>` +
        `<style>${STYLE}</style>` +
        '<rect class="background" width="100%" height="100%" rx="8"/>',
    ) + "\n";
}

/** A text at the top left of the frame. */
function heading(
  text: string,
  options: { dy: number; fontSize?: number; fontWeight?: string },
) {
  return Plot.text([text], {
    frameAnchor: "top-left",
    dx: -72,
    text: (line: string) => line,
    ...options,
  });
}

function inEnglish(value: number): string {
  return Math.round(value).toLocaleString("en");
}

/** The figures in words, for readers who do not see the chart. */
function describe(figures: Figure[]): string {
  return figures.map(({ server, size, rate }) =>
    `${server}, ${inEnglish(size)} clients: ` +
    `${inEnglish(rate)} lines a second.`
  ).join(" ");
}
