import Charts
import LordbaDemo
import LordbaKit
import SwiftUI

/// What adapters cost on this device: medians and 99th percentiles per phase, and the profile file to share.
struct LatencyScreen: View {
  @Environment(AppModel.self) private var app
  @State private var chosen: URL?

  private var bundles: [ModelBundle] { app.library.entries.compactMap(\.bundle) }
  private var bundle: ModelBundle? { bundles.first { $0.folder == chosen } ?? bundles.first }

  var body: some View {
    @Bindable var latency = app.latency
    NavigationStack {
      List {
        Section {
          Picker("Model", selection: $chosen) {
            ForEach(bundles, id: \.folder) { Text($0.folder.lastPathComponent).tag(URL?.some($0.folder)) }
          }
          Stepper(
            "Prompt of \(latency.benchmark.prefillTokens) tokens", value: $latency.benchmark.prefillTokens,
            in: 16...512, step: 16)
          if latency.isRunning {
            ProgressView(value: latency.share) { Text("Base and adapters in turns") }
            Button("Cancel", role: .cancel) { latency.cancel() }
          } else {
            Button("Measure") { measure() }.disabled(bundle == nil)
          }
        }
        ForEach(latency.phases, id: \.self) { phase in
          Section("\(phase), ms") { PhaseChart(bars: latency.bars.filter { $0.phase == phase }) }
        }
        if let decode = latency.series.first(where: { $0.phase == "decode" && $0.adapter != "none" }) {
          Section("decode, every token") { SamplesChart(series: decode) }
        }
      }
      .navigationTitle("Latency")
      .toolbar {
        if let file = latency.file { ShareLink("Share the profile", item: file) }
      }
      .problemAlert($latency.problem)
    }
  }

  private func measure() {
    guard let bundle else { return }
    Task { await app.measure(bundle) }
  }
}

private struct PhaseChart: View {
  let bars: [LatencyModel.Bar]

  var body: some View {
    Chart(bars) { bar in
      BarMark(x: .value("median", bar.median), y: .value("adapter", bar.adapter))
        .annotation(position: .trailing, alignment: .leading) { Text(note(bar)).font(.caption2.monospacedDigit()) }
      RuleMark(xStart: .value("median", bar.median), xEnd: .value("p99", bar.p99), y: .value("adapter", bar.adapter))
        .foregroundStyle(.secondary)
    }
    .frame(height: CGFloat(36 * bars.count + 28))
    .accessibilityLabel("median and 99th percentile by adapter")
  }

  private func note(_ bar: LatencyModel.Bar) -> String {
    let median = bar.median.formatted(.number.precision(.significantDigits(3)))
    guard let over = bar.overheadPercent else { return median }
    return "\(median)  \(over.formatted(.number.precision(.fractionLength(1)).sign(strategy: .always()))) %"
  }
}

private struct SamplesChart: View {
  let series: Series

  var body: some View {
    Chart(Array(series.samples.enumerated()), id: \.offset) { sample in
      LineMark(x: .value("token", sample.offset), y: .value("ms", sample.element))
    }
    .frame(height: 140)
  }
}
