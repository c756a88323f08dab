from qies.cli import main

main()
