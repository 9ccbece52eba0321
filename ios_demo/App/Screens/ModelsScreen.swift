import LordbaDemo
import LordbaKit
import SwiftUI
import UniformTypeIdentifiers

/// The bundles on this device: their check, their adapters, what the export measured.
struct ModelsScreen: View {
  @Environment(AppModel.self) private var app
  @State private var isImporting = false

  var body: some View {
    @Bindable var library = app.library
    NavigationStack {
      List {
        ForEach(library.entries) { entry in
          NavigationLink(value: entry.id) { BundleRow(entry: entry) }
            .swipeActions {
              Button("Delete", systemImage: "trash", role: .destructive) { delete(entry) }
            }
        }
      }
      .overlay {
        if library.entries.isEmpty {
          ContentUnavailableView(
            "No models yet", systemImage: "shippingbox",
            description: Text("Export a bundle with python -m lordba.export and copy its folder here with Finder."))
        }
      }
      .navigationTitle("Models")
      .navigationDestination(for: URL.self) { id in
        if let entry = library.entries.first(where: { $0.id == id }) { BundleScreen(entry: entry) }
      }
      .toolbar {
        Button("Add a bundle", systemImage: "plus") { isImporting = true }
      }
      .refreshable { await library.refresh() }
      .fileImporter(isPresented: $isImporting, allowedContentTypes: [.folder]) { result in
        Task { await add(result) }
      }
      .problemAlert($library.problem)
    }
  }

  private func add(_ result: Result<URL, any Error>) async {
    switch result {
    case .success(let folder):
      let isScoped = folder.startAccessingSecurityScopedResource()
      defer { if isScoped { folder.stopAccessingSecurityScopedResource() } }
      await app.library.add(folder)
    case .failure(let error): app.library.problem = error.localizedDescription
    }
  }

  private func delete(_ entry: BundleLibrary.Entry) {
    if app.chat?.bundle.folder == entry.folder { app.close() }
    app.library.delete(entry)
  }
}

private struct BundleRow: View {
  let entry: BundleLibrary.Entry

  var body: some View {
    VStack(alignment: .leading, spacing: 2) {
      Text(entry.name).font(.headline)
      switch entry.state {
      case .checking: Label("checking every file", systemImage: "hourglass").foregroundStyle(.secondary)
      case .ready(let bundle):
        Text("\(bundle.manifest.base.name), \(bundle.manifest.target), \(bundle.manifest.adapters.count) adapters")
          .foregroundStyle(.secondary)
      case .refused(let why): Label(why, systemImage: "exclamationmark.triangle").foregroundStyle(.red)
      }
    }
    .font(.footnote)
  }
}

/// One bundle: what its manifest says.
private struct BundleScreen: View {
  @Environment(AppModel.self) private var app
  let entry: BundleLibrary.Entry

  var body: some View {
    List {
      if let bundle = entry.bundle {
        Section {
          Button("Chat with this model") { Task { await app.open(bundle) } }.disabled(app.isOpening)
          LabeledContent("Program", value: bundle.manifest.program)
          LabeledContent("Base", value: "\(bundle.manifest.base.name), \(bundle.manifest.baseQuant)")
          LabeledContent("Longest text", value: "\(bundle.manifest.maxSeqLen) tokens")
        }
        Section("Adapters") { ForEach(bundle.manifest.adapters, id: \.name, content: AdapterRow.init) }
        Section("Parity at the export") {
          ForEach(bundle.manifest.parity.indices, id: \.self) { parity(bundle.manifest.parity[$0]) }
        }
      } else if case .refused(let why) = entry.state {
        Text(why).foregroundStyle(.red)
      }
    }
    .navigationTitle(entry.name)
  }

  private func parity(_ check: ParityCheck) -> some View {
    LabeledContent {
      Text(check.value, format: .number.precision(.significantDigits(3)))
      Image(systemName: check.passed ? "checkmark.circle" : "xmark.octagon")
    } label: {
      Text("\(check.check): \(check.adapter ?? "base")")
      Text(check.metric)
    }
  }
}

private struct AdapterRow: View {
  let adapter: BundleAdapter

  var body: some View {
    LabeledContent {
      Text(Int64(adapter.bytes), format: .byteCount(style: .file))
    } label: {
      Text(adapter.name)
      Text(
        "rank \(adapter.rank), \(adapter.scaleCode), \(adapter.bitsPerWeight.formatted(.number.precision(.fractionLength(2)))) bits per weight"
      )
    }
  }
}

extension View {
  /// Shows a problem until it is dismissed.
  func problemAlert(_ problem: Binding<String?>) -> some View {
    let isShown = Binding(get: { problem.wrappedValue != nil }, set: { if !$0 { problem.wrappedValue = nil } })
    return alert("That did not work", isPresented: isShown) {
      Button("OK", role: .cancel) {}
    } message: {
      Text(problem.wrappedValue ?? "")
    }
  }
}
